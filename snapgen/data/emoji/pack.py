"""Build the embedded data sets of captioned emoji, from eight npm packages, as webdataset shards.

    pip install 'archsearch[pack]'
    python -m snapgen.data.emoji.pack --packages DIR --out snapgen/data/emoji

Packages that are not in DIR are downloaded with ``npm pack``. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from snapgen.data.emoji import styles
from snapgen.data.emoji.concepts import EmojiImage, concept, concepts, normalize, split, without_leaks
from snapgen.data.emoji.npm import NpmPackage, fetch
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write

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
# 32 px costs 27 dB PSNR, so these images are lossless.
QUALITIES = {32: 100, 64: 82}


@dataclass(frozen=True)
class Metadata:
    """Captions and other metadata of the images, from emojibase."""

    entries: dict[str, dict[str, Any]]
    """Entries by normalized hexcode; those with skin tones are left out."""
    groups: dict[int, str]
    """Names of groups by number."""

    @classmethod
    def read(cls, packages: Path) -> Self:
        """Read emojibase's package."""
        entries = json.loads(CAPTIONS.read(packages, "package/en/data.json"))
        groups = json.loads(CAPTIONS.read(packages, "package/en/messages.json"))["groups"]
        return cls(
            {normalize(entry["hexcode"]): entry for entry in entries}, {g["order"]: g["message"] for g in groups}
        )

    @property
    def labels(self) -> dict[str, str]:
        """Labels by normalized hexcode."""
        return {code: entry["label"] for code, entry in self.entries.items()}

    def sample(self, drawing: EmojiImage, concept_name: str) -> dict[str, Any]:
        """Metadata of an image; the caption of an icon names its style."""
        entry = self.entries[drawing.code]
        style = styles.STYLES.get(drawing.vendor)
        group = entry.get("group")
        return {
            "caption": entry["label"] if style is None else f"{entry['label']}, {style} style",
            "tags": entry.get("tags", []),
            "group": self.groups[group] if isinstance(group, int) else "",
            "vendor": drawing.vendor,
            "concept": concept_name,
        }


def pack(packages: Path, out: Path) -> dict[str, int]:
    """Write the shards ``<resolution>-<split>.tar.gz`` and ``<resolution>-<split>-styles.tar.gz``, and emojibase's
    license.

    The icons of the styles follow the split of the Fluent and Noto emoji, and do not change it.

    Args:
        packages: folder of the npm tarballs.
        out: folder to write into.

    Returns:
        Number of images by the name of the shard.

    Raises:
        InputError: if a package is missing or differs from the pinned version.
    """
    metadata = Metadata.read(packages)
    emoji = [drawing for vendor in DRAWINGS for drawing in _drawings(packages, vendor, metadata.entries)]
    icons = [
        drawing
        for icon_set in styles.ICON_SETS
        for drawing in styles.drawings(icon_set, packages, metadata.labels, square=on_white)
    ]
    concept_of = concepts(emoji)
    merged = {concept(code): name for code, name in concept_of.items()}
    concept_of |= {icon.code: merged.get(concept(icon.code), concept(icon.code)) for icon in icons}
    split_of = {code: split(name) for code, name in concept_of.items()}
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "LICENSE-emojibase", CAPTIONS.read(packages, "package/LICENSE"))
    counts = {}
    for suffix, drawings in (("", emoji), ("-styles", without_leaks(icons, emoji, split_of))):
        for resolution in QUALITIES:
            for split_name in ("train", "val"):
                selected = [drawing for drawing in drawings if split_of[drawing.code] == split_name]
                shard = out / f"{resolution}-{split_name}{suffix}.tar.gz"
                _write(shard, _shard(selected, resolution, metadata, concept_of))
                counts[shard.name] = len(selected)
    return counts


def _drawings(packages: Path, vendor: str, labels: Container[str]) -> Iterator[EmojiImage]:
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


def _shard(drawings: Sequence[EmojiImage], resolution: int, metadata: Metadata, concept_of: Mapping[str, str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        # Ordered by hash, so that the first samples of a shard are a fair sample of all its vendors and groups.
        for drawing in sorted(drawings, key=lambda drawing: hashlib.sha256(drawing.key.encode()).digest()):
            sample = metadata.sample(drawing, concept_of[drawing.code])
            _add(tar, f"{drawing.key}.json", json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode())
            _add(tar, f"{drawing.key}.webp", _webp(drawing.image, resolution, QUALITIES[resolution]))
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
        for package in (FLUENT, NOTO, CAPTIONS, *styles.ICON_SETS):
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
