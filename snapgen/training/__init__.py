"""Stages, batches, the loop."""
