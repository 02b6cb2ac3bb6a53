"""Backends that measure."""
