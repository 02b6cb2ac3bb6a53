"""One image file, whatever its format and shape, as a square of RGB bytes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# By content, not by suffix. Pillow's other formats are left out: some start other programs or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# A file may claim any size; 89 million pixels (Pillow's own limit) are more than any camera's picture.
LARGEST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

# Pillow warns before `decode` can refuse such a file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(image: Path | bytes, resolution: int) -> torch.Tensor | None:
    """The middle square of an image, upright, on white, at a resolution.

    Args:
        image: a file, or its content.
        resolution: pixels a side.

    Returns:
        uint8 ``(3, resolution, resolution)``, or None if the image is damaged, too large or of no known format.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as file:
            if file.width * file.height > LARGEST_PIXELS:
                return None
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time.
            file.draft("RGB", (2 * resolution, 2 * resolution))
            upright = ImageOps.exif_transpose(file)
        square = ImageOps.fit(_on_white(upright), (resolution, resolution), Image.Resampling.LANCZOS)
    except Exception:  # decoders of damaged bytes raise anything from SyntaxError to struct.error
        return None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel; Pillow would clip it
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")
