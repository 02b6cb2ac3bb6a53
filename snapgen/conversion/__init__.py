"""Diffusers U-Nets as ours."""
