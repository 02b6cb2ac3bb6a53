"""Short-run quality of a network."""
