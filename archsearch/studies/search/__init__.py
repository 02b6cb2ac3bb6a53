"""Propose, score, report one candidate after another."""
