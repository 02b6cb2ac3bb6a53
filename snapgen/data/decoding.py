"""Decoding of an image file of any supported format and shape to a square of RGB bytes."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# Detected by content, not by suffix. Other formats of Pillow are excluded: some run programs or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# A damaged or malicious file may claim any size; Pillow's own limit of 89 million pixels exceeds any camera's.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

# Pillow warns about such files before `decode` can refuse them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(image: Path | bytes, resolution: int) -> torch.Tensor | None:
    """Decode the central square of an image, upright and on white, and scale it.

    Args:
        image: path or content of the file.
        resolution: height and width of the result.

    Returns:
        uint8 ``(3, resolution, resolution)``, or None if the image is damaged, too large or in an unsupported format.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                return None
            # JPEG files can be decoded at 1/2, 1/4 or 1/8 of their size in a fraction of the time.
            file.draft("RGB", (2 * resolution, 2 * resolution))
            upright = ImageOps.exif_transpose(file)
        square = ImageOps.fit(_on_white(upright), (resolution, resolution), Image.Resampling.LANCZOS)
    except Exception:  # decoders raise anything from SyntaxError to struct.error on damaged files
        return None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (H, W, 3) → (3, H, W)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per channel, which Pillow would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")
