"""Pictures, folders and shards for tests of data sets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from snapgen.data.dataset import ImageDataset, load_dataset


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def fill(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files, by their names below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def pictures(*names: str) -> dict[str, bytes]:
    """Different pictures by their names."""
    return {name: picture(i) for i, name in enumerate(names)}


def shard(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar of files, in order; a name may be there twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def both(source: Path | str, resolution: int = 8) -> tuple[ImageDataset, ImageDataset]:
    """The two splits of a source."""
    return (
        load_dataset(str(source), split="train", resolution=resolution),
        load_dataset(str(source), split="val", resolution=resolution),
    )


def train(source: Path | str) -> ImageDataset:
    """The training images of a source."""
    return load_dataset(str(source), split="train", resolution=8)
