"""Tabular benchmark: the runs of every architecture of a space as a file, and searches that are replayed on it."""
