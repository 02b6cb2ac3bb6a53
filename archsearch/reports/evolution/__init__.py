"""The section of an evolution."""
