"""The table of an ablation."""
