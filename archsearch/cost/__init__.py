"""Parameters, MACs and memory on the meta device."""
