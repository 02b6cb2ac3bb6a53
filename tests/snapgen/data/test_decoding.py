from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snapgen.data.decoding import MAX_PIXELS, decode


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole(image: bytes | Path, resolution: int = 8) -> torch.Tensor:
    pixels = decode(image, resolution)
    assert pixels is not None
    assert pixels.shape == (3, resolution, resolution)
    assert pixels.dtype == torch.uint8
    return pixels


def claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_an_image_of_the_right_size_keeps_its_bytes() -> None:
    image = noise(8, 8)
    assert torch.equal(whole(encoded(image)).permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_the_middle_is_kept() -> None:
    image = Image.new("RGB", (24, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    assert (whole(encoded(image)) == torch.tensor([0, 0, 255]).reshape(3, 1, 1)).all()


def test_what_is_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (whole(encoded(clear)) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (whole(encoded(palette, transparency=0)) == 255).all()
    half = Image.new("LA", (8, 8), (0, 128))
    assert (whole(encoded(half)) == 127).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert (whole(encoded(image)) == 128).all()


def test_a_photo_is_turned_upright() -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the top is at the right
    pixels = whole(encoded(image, "JPEG", exif=exif, quality=95))
    assert pixels[:, :, 6:].float().mean() < 20
    assert pixels[:, :, :2].float().mean() > 235


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_formats_and_modes(kind: str, mode: str) -> None:
    image = Image.new("RGB", (33, 20), (200, 200, 200)).convert(mode)
    try:
        content = encoded(image, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    assert (whole(content).float() - 200).abs().max() <= (55 if mode in ("1", "P") or kind == "GIF" else 6)


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(noise(8, 8), "PNG"))
    assert torch.equal(whole(file), whole(encoded(noise(8, 8))))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    whole(encoded(noise(*shape)))


PICTURE = encoded(noise(32, 32))
PHOTO = encoded(noise(64, 64), "JPEG")
WEBP = encoded(noise(64, 64), "WEBP")


DAMAGED = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "text": b"not an image at all",
    "header": PICTURE[:20],
    "cut png": PICTURE[:-200],
    "cut jpeg": PHOTO[: len(PHOTO) // 2],
    "cut webp": WEBP[: len(WEBP) // 2],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "bomb": claiming(65_000, 65_000),
    "just too large": claiming(MAX_PIXELS // 1000 + 1, 1000),
    "no width": claiming(0, 8),
    "too little data": claiming(100, 100),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the module's own filter
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_images_are_none(case: str) -> None:
    assert decode(DAMAGED[case], 8) is None


def test_missing_files_and_folders_are_none(tmp_path: Path) -> None:
    assert decode(tmp_path / "no.png", 8) is None
    assert decode(tmp_path, 8) is None
