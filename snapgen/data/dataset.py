"""Captioned images: the embedded emoji, folders and webdataset shards, through one loader."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from snapgen.data.decoding import FORMATS, decode
from snapgen.data.sources import ImageFolder, RawSample, Split, WebDatasetShards
from snapgen.errors import InputError
from snapgen.io import cache
from snapgen.progress import Progress

EMOJI = Path(__file__).parent / "emoji"
EMOJI_RESOLUTIONS = (32, 64)

# Sets of up to so many decoded bytes are held in memory; larger ones are decoded again for each pass.
HELD_BYTES = 1 << 29
_SHARDS = (".tar", ".tar.gz", ".tgz")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MOST_SHARDS = 1_000_000
_SPLIT_FOLDERS = {"train", "val", "validation", "test"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDataset:
    """One split of a set of captioned images, in a fixed order of which every beginning is a fair sample.

    (Shards of the user's own are read in their own order.)

    Attributes:
        name: the source as it was named.
        split: ``train`` or ``val``.
        resolution: pixels a side.
        captions: one per image.
        digest: 16 hex digits of a hash of this split's images and captions.
        skipped: images left out because they could not be read or had no caption.
    """

    name: str
    split: Split
    resolution: int
    captions: list[str] = field(repr=False)
    digest: str
    skipped: int
    _source: ImageFolder | WebDatasetShards = field(repr=False)
    _readable: torch.Tensor = field(repr=False)
    _held: torch.Tensor | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def pixels(self) -> torch.Tensor:
        """All images, uint8 ``(N, 3, resolution, resolution)``; a set too large for memory is for `batches`."""
        return self._held if self._held is not None else torch.cat(list(self.batches(256)))

    def batches(self, size: int, *, start: int = 0) -> Iterator[torch.Tensor]:
        """The images in order, uint8 ``(≤ size, 3, resolution, resolution)`` each, one per caption in all.

        Args:
            start: images before this one are left out, and not decoded.

        Raises:
            InputError: if a file was changed after the set was opened.
        """
        if self._held is not None:
            yield from torch.split(self._held[start:], size)
            return
        whole = (s for s, readable in zip(self._source.samples(), self._readable.tolist(), strict=False) if readable)
        batch: list[torch.Tensor] = []
        count = start
        for _, pixels in _decoded(itertools.islice(whole, start, None), self.resolution):
            if pixels is None:
                break
            batch.append(pixels)
            count += 1
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if count != len(self):
            raise InputError(self.name, "was changed while it was being read", "leave it alone and run again")
        if batch:
            yield torch.stack(batch)


def open_images(source: str, *, split: Split, resolution: int) -> ImageDataset:
    """The images of a source, cut to squares (the middle) and scaled, on white.

    Args:
        source: one of

            - ``emoji``: the embedded Fluent and Noto emoji;
            - a folder of images. Sub-folders are classes, their names captions (``_`` becomes a space; WordNet ids are
              looked up in ImageNet's ``LOC_synset_mapping.txt``, there or in a folder above); without sub-folders the
              file's name is the caption. A ``.txt`` beside an image overrides both. With sub-folders ``train`` and
              ``val``, those are the splits;
            - a folder, a glob or a brace list of webdataset shards (``.tar``, ``.tar.gz``), whose samples have an image
              and a ``.txt`` or a ``.json`` with ``caption``.
        split: ``train`` or ``val``; a source without a val part of its own gives every tenth image, by the hash of its
            name.
        resolution: pixels a side.

    Damaged images are counted and left out, with one line in the log. What was read is kept (`cache.cached`): opening
    the same set again is a matter of milliseconds.

    Raises:
        InputError: if the source is missing, is neither, or has no readable image in this split.
    """
    assert split in ("train", "val"), split
    assert resolution > 0, resolution
    found = _find(source, split, resolution)
    digest = found.digest()
    key: dict[str, cache.JSON] = {"digest": digest, "resolution": resolution, "formats": FORMATS, "version": 1}
    read = cache.cached_tensors("images", key, lambda: _read(found, resolution, source, split))
    facts = json.loads(read["facts"].numpy().tobytes())
    readable = read["readable"]
    skipped = len(readable) - len(facts["captions"])
    for shard in facts["broken"]:
        _log.warning("%s breaks off or is no tar; only what stands before that is used", shard)
    if skipped:
        _log.warning("%s: skipped %d of %d images: damaged, or without a caption", source, skipped, len(readable))
    return ImageDataset(
        name=source,
        split=split,
        resolution=resolution,
        captions=facts["captions"],
        digest=digest,
        skipped=skipped,
        _source=found,
        _readable=readable,
        _held=read.get("pixels"),
    )


def _read(source: ImageFolder | WebDatasetShards, resolution: int, name: str, split: Split) -> dict[str, torch.Tensor]:
    """Every sample decoded once: which are readable, their captions, and their pixels if they fit in memory."""
    captions: list[str] = []
    readable: list[bool] = []
    held: list[torch.Tensor] | None = []
    progress = Progress(name, "checked", "images", source.count)
    for caption, pixels in _decoded(source.samples(), resolution):
        progress.add()
        readable.append(pixels is not None)
        if pixels is None:
            continue
        captions.append(caption)
        if held is not None:
            held.append(pixels)
            if len(held) * pixels.numel() > HELD_BYTES:
                held = None
    if not captions:
        raise source.nothing(name, split, len(readable))
    facts = json.dumps({"captions": captions, "broken": source.broken}).encode()
    read = {"facts": torch.frombuffer(bytearray(facts), dtype=torch.uint8), "readable": torch.tensor(readable)}
    return read if held is None else {**read, "pixels": torch.stack(held)}


def _decoded(samples: Iterable[RawSample], resolution: int) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Caption and pixels of each sample, in order, decoded on several threads a little ahead."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[str, Future[torch.Tensor | None]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for sample in samples:
            waiting.append((sample.caption, pool.submit(decode, sample.image, resolution)))
            if len(waiting) > 8 * threads:
                caption, future = waiting.popleft()
                yield caption, future.result()
        for caption, future in waiting:
            yield caption, future.result()


def _find(source: str, split: Split, resolution: int) -> ImageFolder | WebDatasetShards:
    if source == "emoji":
        if resolution > EMOJI_RESOLUTIONS[-1]:
            problem = f"the embedded emoji are {EMOJI_RESOLUTIONS[-1]} px wide, not {resolution}"
            raise InputError(source, problem, "use a lower resolution, or a folder of your own images")
        size = next(size for size in EMOJI_RESOLUTIONS if size >= resolution)
        return WebDatasetShards([EMOJI / f"{size}-{split}.tar.gz"])
    if not source or "://" in source or source.startswith("pipe:") or "\0" in source:
        raise InputError(source or "data", "is not a path", "name a folder, a .tar file, or use 'emoji'")
    path = Path(source).expanduser()
    try:
        return _in_folder(path, split) if path.is_dir() else WebDatasetShards(_expanded(str(path)), split)
    except OSError as error:
        raise InputError(source, (error.strerror or "cannot be read").lower(), "name a readable folder") from None


def _expanded(source: str) -> list[Path]:
    """The shards that a path, a glob or a brace list names."""
    from braceexpand import braceexpand

    # The library writes a whole range out before its first name is looked for.
    if any(abs(int(last) - int(first)) > _MOST_SHARDS for first, last in _RANGE.findall(source)):
        raise InputError(
            source, f"lists more than {_MOST_SHARDS:,} shards", "write a shorter range, or name the folder"
        )
    try:
        patterns = [source] if Path(source).exists() else braceexpand(source)
    except ValueError:
        raise InputError(source, "has a brace without its partner", "write e.g. shards/{000..009}.tar") from None
    matches = (match for pattern in patterns for match in glob.glob(pattern) or [pattern])  # noqa: PTH207 - absolute
    return sorted({_shard(Path(match)) for match in matches})


def _shard(path: Path) -> Path:
    if not path.exists():
        problem = "matches no file" if glob.has_magic(str(path)) else "does not exist"
        raise InputError(path, problem, "check the path, or use 'emoji'")
    if not path.is_file() or not path.name.endswith(_SHARDS):
        raise InputError(path, "is neither a folder of images nor a .tar shard", "name one of these, or 'emoji'")
    return path


def _in_folder(path: Path, split: Split) -> ImageFolder | WebDatasetShards:
    """The folder's own split, or its share of everything in it."""
    folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    root = path
    share: Split | None = split
    if "train" in folders and folders <= _SPLIT_FOLDERS:
        root = path / "train"
        validation = next((path / name for name in ("val", "validation") if name in folders), None)
        if validation:
            share = None
            if split == "val":
                _refuse_unsorted(validation, root)
                root = validation
    shards = sorted(entry for entry in root.iterdir() if entry.name.endswith(_SHARDS) and entry.is_file())
    return WebDatasetShards(shards, share) if shards else ImageFolder(root, path, share)


def _refuse_unsorted(validation: Path, train: Path) -> None:
    """ImageNet's validation images come unsorted: their captions would be their file names."""
    classes = any(entry.is_dir() for entry in train.iterdir())
    if classes and not any(entry.is_dir() or entry.name.endswith(_SHARDS) for entry in validation.iterdir()):
        raise InputError(validation, "has no class folders, but train has", "sort its images into the same folders")
