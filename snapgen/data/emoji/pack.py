"""Build the embedded data set: captioned Fluent and Noto emoji, from three npm packages, as webdataset shards.

    python -m snapgen.data.emoji.pack --packages DIR --out snapgen/data/emoji

Packages that are not in DIR are downloaded with ``npm pack``. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write


@dataclass(frozen=True)
class NpmPackage:
    """An npm package at one version; ``sha512`` is the registry's integrity value in base64."""

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
        """Name of the package's tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLUENT = NpmPackage(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NOTO = NpmPackage(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
CAPTIONS = NpmPackage(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
DRAWINGS = {
    "fluent": (FLUENT, re.compile(r"package/assets/(?P<code>[^/]+)\.webp")),
    "noto": (NOTO, re.compile(r"package/img/google/64/(?P<code>[^/]+)\.png")),
}

# Resolution → WebP quality; 100 is lossless. Lossy WebP halves the resolution of the colors at every quality, which at
# 32 px costs 27 dB PSNR, so these images are lossless. The whole set stays below 9 MB.
QUALITIES = {32: 100, 64: 82}
VALIDATION_FRACTION = 0.12

# Images closer than this (root mean square over 16×16 RGB bytes) count as the same picture: the flags of Norway and
# Svalbard, man judge and judge. From about 7 on they are different emoji that look alike: speech and thought balloon.
SAME_PICTURE_RMS = 6.0

_TONE = re.compile(r"1f3f[b-f]")
_VARIANT = re.compile(r"-200d-(2640|2642|27a1)(?=-|$)")  # woman's, man's, facing right
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}


@dataclass(frozen=True)
class EmojiImage:
    """One vendor's image of an emoji, square and on white; ``code`` is its normalized hexcode."""

    vendor: str
    code: str
    image: Image.Image

    @property
    def key(self) -> str:
        """Name of the sample in a shard."""
        return f"{self.vendor}-{self.code}"


def normalize(hexcode: str) -> str:
    """Normalize a hexcode: lower case, at least four digits each, no presentation selectors and cancel tags."""
    codepoints = (digits.zfill(4) for digits in re.split("[-_]", hexcode.lower()))
    return "-".join(digits for digits in codepoints if digits not in ("fe0f", "e007f"))


def concept(code: str) -> str:
    """Hexcode of an emoji without its skin tone, gender and direction."""
    codepoints = [digits for digits in code.split("-") if not _TONE.fullmatch(digits)] or [code]
    return _VARIANT.sub("", "-".join(_NEUTRAL.get(digits, digits) for digits in codepoints))


def concepts(drawings: Sequence[EmojiImage]) -> dict[str, str]:
    """Map hexcodes to concepts, after merging concepts that share a picture (`SAME_PICTURE_RMS`)."""
    parent = {concept(drawing.code): concept(drawing.code) for drawing in drawings}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    small = [np.asarray(drawing.image.resize((16, 16), Image.Resampling.LANCZOS)) for drawing in drawings]
    flat = np.stack(small).reshape(len(drawings), -1).astype(np.float64)  # of integers, so that the products are exact
    norms = (flat**2).sum(axis=1)
    squares = norms[:, None] + norms[None, :] - 2 * flat @ flat.T  # ‖a − b‖² = ‖a‖² + ‖b‖² − 2·a·b
    for i, j in np.argwhere(np.triu(squares < SAME_PICTURE_RMS**2 * flat.shape[1], k=1)).tolist():
        first, second = sorted((root(concept(drawings[i].code)), root(concept(drawings[j].code))))
        parent[second] = first
    return {drawing.code: root(concept(drawing.code)) for drawing in drawings}


def split(concept_name: str) -> str:
    """Split of a concept: ``val`` for `VALIDATION_FRACTION` of them, chosen by hash, else ``train``."""
    fraction = int.from_bytes(hashlib.sha256(concept_name.encode()).digest()[:8], "big") / 2**64
    return "val" if fraction < VALIDATION_FRACTION else "train"


def pack(packages: Path, out: Path) -> dict[str, int]:
    """Write the shards ``<resolution>-<split>.tar.gz`` and emojibase's license.

    Args:
        packages: folder of the npm tarballs.
        out: folder to write into.

    Returns:
        Number of images by the name of the shard.

    Raises:
        InputError: if a package is missing or differs from the pinned version.
    """
    labels, groups = _captions(packages)
    drawings = [drawing for vendor in DRAWINGS for drawing in _drawings(packages, vendor, labels)]
    concept_of = concepts(drawings)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "LICENSE-emojibase", _member(packages, CAPTIONS, "package/LICENSE"))
    counts = {}
    for resolution, quality in QUALITIES.items():
        for split_name in ("train", "val"):
            selected = [drawing for drawing in drawings if split(concept_of[drawing.code]) == split_name]
            shard = out / f"{resolution}-{split_name}.tar.gz"
            _write(shard, _shard(selected, resolution, quality, labels, groups, concept_of))
            counts[shard.name] = len(selected)
    return counts


def fetch(package: NpmPackage, folder: Path) -> Path:
    """Path of the package's tarball in ``folder``, downloaded with ``npm pack`` if it is missing.

    Raises:
        InputError: if it cannot be downloaded, or differs from the pinned version.
    """
    path = folder / package.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            raise InputError(path, "is missing, and npm could not download it", f"run {' '.join(command)}") from None
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise InputError(path, f"is not {package.name} {package.version}", "delete it, to download it again")
    return path


def _captions(packages: Path) -> tuple[dict[str, dict[str, object]], dict[int, str]]:
    """Emojibase's entries by normalized hexcode, and names of groups by number; entries have no skin tones."""
    entries = json.loads(_member(packages, CAPTIONS, "package/en/data.json"))
    groups = json.loads(_member(packages, CAPTIONS, "package/en/messages.json"))["groups"]
    return {normalize(entry["hexcode"]): entry for entry in entries}, {g["order"]: g["message"] for g in groups}


def _member(packages: Path, package: NpmPackage, name: str) -> bytes:
    with tarfile.open(packages / package.file) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{package.file} has no {name}"
        return file.read()


def _drawings(packages: Path, vendor: str, labels: dict[str, dict[str, object]]) -> Iterator[EmojiImage]:
    package, pattern = DRAWINGS[vendor]
    images = {}
    with tarfile.open(packages / package.file) as tar:
        # Two files of an emoji differ only in the presentation selector; the shorter name comes first and is used.
        for member in sorted(tar.getmembers(), key=lambda member: (len(member.name), member.name)):
            match = pattern.fullmatch(member.name)
            code = normalize(match["code"]) if match else ""
            if code in labels and code not in images:
                file = tar.extractfile(member)
                assert file is not None, member.name
                images[code] = EmojiImage(vendor, code, on_white(Image.open(file)))
    yield from (images[code] for code in sorted(images))


def on_white(image: Image.Image) -> Image.Image:
    """Center an image on a white square as wide as its longer side."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def _shard(
    drawings: Sequence[EmojiImage],
    resolution: int,
    quality: int,
    labels: dict[str, dict[str, object]],
    groups: dict[int, str],
    concept_of: dict[str, str],
) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        # Ordered by hash, so that the first samples of a shard are a fair sample of both vendors and all groups.
        for drawing in sorted(drawings, key=lambda drawing: hashlib.sha256(drawing.key.encode()).digest()):
            entry = labels[drawing.code]
            group = entry.get("group")
            metadata = {
                "caption": entry["label"],
                "tags": entry.get("tags", []),
                "group": groups[group] if isinstance(group, int) else "",
                "vendor": drawing.vendor,
                "concept": concept_of[drawing.code],
            }
            _add(tar, f"{drawing.key}.json", json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())
            _add(tar, f"{drawing.key}.webp", _webp(drawing.image, resolution, quality))
    # A tar pads every file to 512 bytes, which triples the size of small images; gzip compresses the padding.
    return gzip.compress(raw.getvalue(), compresslevel=9, mtime=0)


def _webp(image: Image.Image, resolution: int, quality: int) -> bytes:
    file = io.BytesIO()
    small = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    small.save(file, "WEBP", lossless=quality == 100, quality=min(quality, 90), method=6)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    tar.addfile(info, io.BytesIO(content))


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns exit status 2 on invalid input."""
    parser = argparse.ArgumentParser(prog="python -m snapgen.data.emoji.pack", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder of the npm tarballs; downloaded if missing"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the shards")
    options = parser.parse_args(arguments)
    try:
        for package in (FLUENT, NOTO, CAPTIONS):
            fetch(package, options.packages)
        counts = pack(options.packages, options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{name}: {count} images, {(options.out / name).stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
