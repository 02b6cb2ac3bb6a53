"""Conversion of images between bytes and floats, and image grids."""

from __future__ import annotations

import torch
from torch import Tensor

GRID_GAP = 2
"""Pixels between the images of a grid."""

INFERENCE_BATCH_SIZE = 16
"""Images per batch outside training: on a CPU larger batches exceed the caches and are slower."""


def grid(images: Tensor, rows: int, columns: int) -> Tensor:
    """Arrange the first images in a grid on white: (N, 3, H, W) uint8 → (3, H', W') uint8."""
    columns = min(columns, len(images))
    rows = min(rows, -(-len(images) // columns))
    _, channels, height, width = images.shape
    sheet = torch.full(
        (channels, rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP),
        255,
        dtype=torch.uint8,
    )
    for index, image in enumerate(images[: rows * columns]):
        top, left = index // columns * (height + GRID_GAP), index % columns * (width + GRID_GAP)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def to_float(pixels: Tensor) -> Tensor:
    """Convert pixels from uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert images from [-1, 1] to uint8, rounded and clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
