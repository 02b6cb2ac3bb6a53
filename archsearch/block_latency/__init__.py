"""Milliseconds of each block."""
