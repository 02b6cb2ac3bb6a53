"""YAML schemas, and how the shipped files are found."""
