"""Evolve one network block by block."""
