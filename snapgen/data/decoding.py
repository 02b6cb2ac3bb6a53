"""Decoding of an image file of any supported format and shape to a square of sRGB bytes."""

from __future__ import annotations

import functools
import io
import threading
import warnings
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from snapgen import files
from snapgen.data.metadata import without_metadata

# Detected by content, not by suffix. Other formats of Pillow are excluded: some run programs or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# A damaged or malicious file may claim any size; Pillow's own limit of 89 million pixels exceeds any camera's.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
LARGE_PIXELS, LARGE_BYTES = 1 << 24, 1 << 24
"""Images of more pixels, and files of more bytes, are decoded one at a time."""
STRIP_PIXELS = 1 << 20
_ONE_LARGE = threading.RLock()
_COLOR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Modes of Pillow's images, and the color space of profiles that describe them."""
_SAME = 2
"""Largest difference of a profile from sRGB that counts as none."""

# Blocks of this size are given back to the system; smaller ones stay with the thread that decoded the image.
Image.core.set_block_size(1 << 26)  # type: ignore[attr-defined]
# Pillow warns about such files before `decode` can refuse them, and about damaged metadata.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def decode(image: Path | bytes, resolution: int) -> torch.Tensor | None:
    """Decode the central square of an image, upright, in sRGB and on white, and scale it.

    Colors are converted by the embedded profile. Damaged metadata are left out.

    Args:
        image: path or content of the file.
        resolution: height and width of the result.

    Returns:
        uint8 ``(3, resolution, resolution)``, or None if the image is damaged, too large or in an unsupported format.
    """
    with _turn(_size(image) > LARGE_BYTES):
        try:
            return _decode(image, resolution)
        except Exception:  # decoders raise anything from SyntaxError to struct.error on damaged files
            pass
        for version in without_metadata(_content(image)):
            try:
                return _decode(version, resolution)
            except Exception:
                continue
    return None


def why_undecodable(image: Path | bytes) -> str:
    """Why `decode` returns None for an image, as a predicate of several."""
    content = _content(image)
    if not content:
        return f"are empty, larger than {files.MAX_BYTES >> 20} MiB, or cannot be opened"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            too_large = file.width * file.height > MAX_PIXELS
    except Image.DecompressionBombError:
        too_large = True
    except UnidentifiedImageError:
        return f"are damaged or none of {', '.join(FORMATS)}"
    except Exception:  # as above
        return "are damaged"
    return f"have more than {MAX_PIXELS // 10**6} million pixels" if too_large else "are damaged"


def _turn(large: bool) -> AbstractContextManager[object]:
    """Wait for the turn of a large image, of which one is decoded at a time."""
    return _ONE_LARGE if large else nullcontext()


def _size(image: Path | bytes) -> int:
    try:
        return len(image) if isinstance(image, bytes) else image.stat().st_size
    except OSError:
        return 0


def _content(image: Path | bytes) -> bytes:
    try:
        return image if isinstance(image, bytes) else files.read_bytes(image)
    except OSError:
        return b""


def _decode(image: Path | bytes, resolution: int) -> torch.Tensor | None:
    with Image.open(io.BytesIO(_content(image)), formats=FORMATS) as file:
        pixels = file.width * file.height
        if pixels > MAX_PIXELS:
            return None
        with _turn(pixels > LARGE_PIXELS), closing(file):
            # JPEG files can be decoded at 1/2, 1/4 or 1/8 of their size in a fraction of the time.
            file.draft("RGB", (2 * resolution, 2 * resolution))
            file.load()
            square = ImageOps.fit(_on_white(_upright(file)), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (H, W, 3) → (3, H, W)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # a damaged EXIF block raises as much as damaged pixels
        return image


def _on_white(image: Image.Image) -> Image.Image:
    """The image in sRGB, with white behind what is transparent; a large one is converted in strips, to save memory."""
    rows = max(1, STRIP_PIXELS // image.width)
    if image.width * image.height <= LARGE_PIXELS:
        return _converted(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_converted(strip), (0, top))
    return whole


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per channel, which Pillow would clip
        profile = image.info.get("icc_profile")
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image.info["icc_profile"] = profile
    elif image.mode == "F":
        raise ValueError("floats have no range that is known")
    colors = _srgb(image)
    if not image.has_transparency_data:
        return colors
    colors.putalpha(image.convert("RGBA").getchannel("A"))
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(colors)
    return white.convert("RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """The colors of an image, converted to sRGB by its profile if it has one that fits."""
    profile = image.info.get("icc_profile")
    if profile:
        mode = {"L": "L", "LA": "L", "1": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
        transform = _to_srgb(profile, mode)
        if transform is not None:
            return transform.apply(image.convert(mode))
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to sRGB; None if it is damaged, of another color space, or does not change colors."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _COLOR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(cube).convert(mode)
    change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB")).astype(int)
    return transform if np.abs(change).max() > _SAME else None
