"""Latency measured by another machine."""
