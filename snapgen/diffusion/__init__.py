"""Noise processes, predictions, samplers."""
