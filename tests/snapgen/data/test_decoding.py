from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from snapgen.data import decoding
from snapgen.data.decoding import MAX_PIXELS, decode, why_undecodable


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


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_an_image_in_strips_is_the_same_image(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 29, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGBA":
        image = image.convert(mode)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = encoded(image, icc_profile=profile, **({"transparency": 3} if mode == "P" else {}))
    at_once = whole(file)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 100)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 100)
    assert torch.equal(whole(file), at_once)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc; elsewhere a process's peak begins with its parent's")
def test_large_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    """Two of 64 million pixels, of which each takes 256 MB a copy; a process of its own, to see its peak."""
    Image.new("RGB", (8000, 8000)).save(tmp_path / "a.png", compress_level=1)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    script = f"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from snapgen.data.decoding import decode
with ThreadPoolExecutor(4) as pool:
    assert all(each is not None for each in pool.map(lambda p: decode(p, 8), [*Path({str(tmp_path)!r}).iterdir()] * 2))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
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


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", "are empty"),
        ("text", "are damaged or none of JPEG"),
        ("cut png", "are damaged"),
        ("bomb", "89 million"),
    ],
)
def test_the_cause_is_told(case: str, words: str) -> None:
    assert words in why_undecodable(DAMAGED[case])


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert why_undecodable(tmp_path / "no.png") == "are empty, larger than 256 MiB, or cannot be opened"


# --- metadata never costs pixels ---


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunks(content: bytes, *chunks: bytes) -> bytes:
    """A PNG file with chunks after its header, which has 33 bytes with the signature."""
    return content[:33] + b"".join(chunks) + content[33:]


def with_segment(content: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG file with a segment at its beginning."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + content[2:]


LONG = b"parameters\0\0" + zlib.compress(b"a prompt " * 300_000)
BAD_METADATA = {
    "large compressed text": with_chunks(PICTURE, chunk(b"zTXt", LONG)),
    "many large texts": with_chunks(PICTURE, *[chunk(b"tEXt", b"a\0" + b"x" * 900_000)] * 80),
    "large international text": with_chunks(PICTURE, chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG[12:])),
    "text with a wrong checksum": with_chunks(PICTURE, chunk(b"tEXt", b"a\0b", crc=0)),
    "broken profile": with_chunks(PICTURE, chunk(b"iCCP", b"icc\0\0" + b"no zlib")),
    "short physical size": with_chunks(PICTURE, chunk(b"pHYs", b"\0")),
    "broken exif": with_chunks(PICTURE, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff" + b"\xff" * 40)),
    "jpeg with broken exif": with_segment(PHOTO, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40),
    "jpeg with broken photoshop data": with_segment(PHOTO, 0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1x"),
    "jpeg with a broken profile": with_segment(PHOTO, 0xE2, b"ICC_PROFILE\0\1\1" + b"no profile"),
    "jpeg with broken mpf": with_segment(PHOTO, 0xE2, b"MPF\0" + b"MM\0*\0\0\0\x08\xff\xff" + b"\0" * 20),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_damaged_and_large_metadata_cost_no_pixels(case: str) -> None:
    plain = PHOTO if case.startswith("jpeg") else PICTURE
    assert torch.equal(whole(BAD_METADATA[case], 16), whole(plain, 16))


def test_a_large_text_costs_neither_orientation_nor_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise(16, 16), exif=exif, icc_profile=ADOBE)
    assert not torch.equal(whole(content), whole(encoded(noise(16, 16))))
    assert torch.equal(whole(with_chunks(content, chunk(b"zTXt", LONG))), whole(content))


# --- colors are sRGB ---


def matrix_profile(
    red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float], gamma: float
) -> bytes:
    """A profile of primaries by their chromaticities, with white D50 and one gamma, as ICC.1 describes it."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (red, green, blue)]).T
    white = np.array([0.9642, 1.0, 0.8249])
    columns = columns * np.linalg.solve(columns, white)

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(white)}
    tags |= {name: xyz(columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    size = offset + len(data)
    header = struct.pack(">I", size) + b"lcms" + b"\x02\x40\0\0" + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp"
    header = header.ljust(68, b"\0") + b"".join(struct.pack(">i", round(value * 65536)) for value in white)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


ADOBE = matrix_profile((0.6484, 0.3309), (0.2302, 0.7016), (0.1559, 0.0660), 2.2)
"""Adobe RGB (1998), its primaries adapted to D50."""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_an_embedded_profile_is_converted_to_srgb(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (120, 200, 60))
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(ADOBE)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    options = {"quality": 100} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    found = whole(encoded(image, kind, icc_profile=ADOBE, **options)).float().mean((1, 2))
    wanted = torch.tensor(np.asarray(expected)[0, 0]).float()
    assert (found - wanted).abs().max() <= (6 if kind in ("JPEG", "AVIF") else 2)  # those two lose colors
    assert (wanted - torch.tensor([120.0, 200.0, 60.0])).abs().max() > 20


def test_profiles_of_gray_alpha_palette_and_cmyk() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("L", "LA", "P", "CMYK", "RGBA"):  # of RGB, which fits none of gray and CMYK
        image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
        kind = "TIFF" if mode == "CMYK" else "PNG"
        plain = whole(encoded(image, kind))
        assert torch.equal(whole(encoded(image, kind, icc_profile=profile)), plain)
        shifted = whole(encoded(image, kind, icc_profile=ADOBE))
        assert torch.equal(shifted, plain) == (mode in ("L", "LA", "CMYK"))
    clear = Image.new("RGBA", (8, 8), (120, 200, 60, 0))
    assert (whole(encoded(clear, icc_profile=ADOBE)) == 255).all()


def test_an_srgb_profile_changes_no_byte() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = noise(8, 8)
    assert torch.equal(whole(encoded(image, icc_profile=profile)), whole(encoded(image)))
    assert torch.equal(whole(encoded(image, icc_profile=b"no profile")), whole(encoded(image)))
