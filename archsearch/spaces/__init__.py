"""What may vary: search spaces over architectures."""
