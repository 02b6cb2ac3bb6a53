"""The description of a U-Net, overrides along paths, presets; imports no torch."""
