"""Images as bytes and as floats, and grids of them."""

from __future__ import annotations

import torch
from torch import Tensor

GAP = 2
"""Pixels between them."""


def grid(images: Tensor, rows: int, columns: int) -> Tensor:
    """The first images in rows on white, with a gap: (N, 3, H, W) uint8 → (3, H', W') uint8."""
    columns = min(columns, len(images))
    rows = min(rows, -(-len(images) // columns))
    _, channels, height, width = images.shape
    sheet = torch.full((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8)
    for index, image in enumerate(images[: rows * columns]):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


BATCH = 16
"""Images that go through at once outside training: on a CPU larger batches leave its caches and are slower."""


def to_float(pixels: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
