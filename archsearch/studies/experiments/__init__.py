"""Ablation, proxy audit, validation of a latency model."""
