"""Latency predicted from operations."""
