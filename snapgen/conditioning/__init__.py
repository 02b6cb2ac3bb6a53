"""Captions to contexts."""
