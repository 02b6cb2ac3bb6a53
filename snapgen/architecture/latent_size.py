"""Height and width of a latent."""

from __future__ import annotations

LatentSize = int | tuple[int, int]
"""Height and width; one number stands for both."""


def latent_sides(size: LatentSize) -> tuple[int, int]:
    """Height and width.

    >>> latent_sides(64), latent_sides((64, 96))
    ((64, 64), (64, 96))
    """
    return (size, size) if isinstance(size, int) else size
