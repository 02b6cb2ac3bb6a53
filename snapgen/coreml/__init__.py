"""Export to Core ML and what falls off the Neural Engine."""
