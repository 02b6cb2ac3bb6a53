"""Data sets of captioned images: the embedded emoji, folders of images and webdataset shards."""

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

from snapgen.data.decoding import FORMATS, decode, why_undecodable
from snapgen.data.folder import ImageFolder
from snapgen.data.shards import WebDatasetShards
from snapgen.data.sources import NOT_USED, RawSample, Source, Split
from snapgen.data.splits import SHARDS, Splits, shards_in, splits_of_folder, splits_of_shards
from snapgen.errors import InputError, os_errors
from snapgen.findings import Findings, note
from snapgen.io import cache
from snapgen.progress import ProgressLog

EMOJI = Path(__file__).parent / "emoji"
EMOJI_RESOLUTIONS = (32, 64)
EMBEDDED = {"emoji": ("",), "emoji-styles": ("", "-styles")}
"""Embedded data sets, with the suffixes of their shards."""

# Data sets up to this decoded size are kept in memory; larger ones are decoded again in every pass.
MAX_IN_MEMORY_BYTES = 1 << 29
MAX_PENDING_BYTES = 1 << 26
"""Size of files of shards that wait to be decoded."""
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MAX_SHARDS = 1_000_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDataset:
    """One split of a set of captioned images, in a fixed order.

    The order of a folder's images is random, so that the first images are a fair sample; shards keep their own order.

    Attributes:
        name: the source as the user named it.
        split: ``train`` or ``val``.
        resolution: height and width of the images.
        captions: one per image.
        digest: 16 hex digits of a hash of this split's images and captions.
        skipped: number of images left out, for the causes that the log names.
    """

    name: str
    split: Split
    resolution: int
    captions: list[str] = field(repr=False)
    digest: str
    skipped: int
    _source: Source = field(repr=False)
    _readable: torch.Tensor = field(repr=False)
    _in_memory: torch.Tensor | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def pixels(self) -> torch.Tensor:
        """All images, uint8 ``(N, 3, resolution, resolution)``; use `batches` for sets larger than memory."""
        return self._in_memory if self._in_memory is not None else torch.cat(list(self.batches(256)))

    def batches(self, size: int, *, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield the images in order as uint8 ``(≤ size, 3, resolution, resolution)``.

        Args:
            size: images per batch; the last batch may be smaller.
            start: index of the first image; earlier ones are not decoded.

        Raises:
            InputError: if a file was changed after the data set was opened.
        """
        if self._in_memory is not None:
            yield from torch.split(self._in_memory[start:], size)
            return
        samples = (s for s, readable in zip(self._source.samples(), self._readable.tolist(), strict=False) if readable)
        batch: list[torch.Tensor] = []
        count = start
        for _, pixels in _decoded(itertools.islice(samples, start, None), self.resolution):
            if pixels is None:
                break
            batch.append(pixels)
            count += 1
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if count != len(self):
            raise InputError(
                self.name, "was changed while it was being read", "do not change it during a run, and run again"
            )
        if batch:
            yield torch.stack(batch)


def load_dataset(source: str, *, split: Split, resolution: int) -> ImageDataset:
    """Load the images of a source, cropped to their central squares and scaled, in sRGB and on white.

    What cannot be used is counted in the log by its cause, each with an example, and so is what is held out or left out
    for the source's names. The decoded set is cached (`snapgen.io.cache.cached_tensors`),
    so that loading it again takes milliseconds.

    Args:
        source: one of

            - ``emoji``: the embedded Fluent and Noto emoji; ``emoji-styles``: these and the same emoji in five more
              styles, which the captions name;
            - a folder of images. A file beside an image (``.txt``, ``.caption``, ``.json`` with ``caption``) or a
              table (``metadata.jsonl``, ``captions.csv``, …) gives its caption. Without them names of sub-folders are
              class names and serve as captions (``_`` becomes a space; WordNet ids are looked up in ImageNet's
              ``LOC_synset_mapping.txt``, in this folder or above it), and without sub-folders the names of the files;
            - a folder, a glob or a brace list of webdataset shards (``.tar``, ``.tar.gz``), whose samples have an image
              and a caption under the same name.
        split: ``train`` or ``val``. Sub-folders and shards named ``train`` and ``val`` (or ``valid``, ``dev``, …) are
            the splits; without them it is one image in ten, by the hash of its name.
        resolution: height and width of the images.

    Raises:
        InputError: if the source does not exist, is none of these, or has no readable image in this split.
    """
    assert split in ("train", "val"), split
    assert resolution > 0, resolution
    images = _open_source(source, split, resolution)
    digest = images.digest()
    key: dict[str, cache.JSON] = {"digest": digest, "resolution": resolution, "formats": FORMATS, "version": 2}
    tensors = cache.cached_tensors("images", key, lambda: _read(images, resolution, source, split))
    metadata = json.loads(tensors["facts"].numpy().tobytes())
    readable = tensors["readable"]
    skipped, remarks = Findings(metadata["skipped"]), Findings(metadata["remarks"])
    for text in images.notes:
        note(source, text)
    for shard in metadata["broken"]:
        _log.warning("%s is truncated or not a tar archive; only the samples before the damage are used", shard)
    if skipped.total:
        _log.warning("%s: skipped %d of %d images: %s", source, skipped.total, len(readable), skipped)
    if remarks.total:
        note(source, f"{NOT_USED}: {remarks}")
    return ImageDataset(
        name=source,
        split=split,
        resolution=resolution,
        captions=metadata["captions"],
        digest=digest,
        skipped=skipped.total,
        _source=images,
        _readable=readable,
        _in_memory=tensors.get("pixels"),
    )


def source_digest(source: str, *, split: Split, resolution: int) -> str:
    """The digest of a data set that `load_dataset` would load, without decoding its images.

    Raises:
        InputError: as `load_dataset`, but for images that cannot be read.
    """
    return _open_source(source, split, resolution).digest()


def _read(source: Source, resolution: int, name: str, split: Split) -> dict[str, torch.Tensor]:
    """Decode every sample once: which are readable, their captions, and their pixels if they fit in memory."""
    captions: list[str] = []
    skipped = Findings()
    readable: list[bool] = []
    images: list[torch.Tensor] | None = []
    progress = ProgressLog(name, "checked", "images", source.count)
    for sample, pixels in _decoded(source.samples(), resolution):
        progress.add()
        readable.append(pixels is not None)
        if pixels is None:
            skipped.add(sample.problem or why_undecodable(sample.image), sample.name)
            continue
        captions.append(sample.caption)
        if images is not None:
            images.append(pixels)
            if len(images) * pixels.numel() > MAX_IN_MEMORY_BYTES:
                images = None
    if skipped.total and not captions:
        raise InputError(name, f"none of its {len(readable)} images can be used: {skipped}", "repair or replace them")
    if not captions:
        raise source.empty_error(name, split)
    findings = {"skipped": skipped.listed(), "remarks": source.remarks.listed()}
    metadata = json.dumps({"captions": captions, "broken": source.broken, **findings}).encode()
    tensors = {"facts": torch.frombuffer(bytearray(metadata), dtype=torch.uint8), "readable": torch.tensor(readable)}
    return tensors if images is None else {**tensors, "pixels": torch.stack(images)}


def _decoded(samples: Iterable[RawSample], resolution: int) -> Iterator[tuple[RawSample, torch.Tensor | None]]:
    """Yield each sample with its pixels, in order; several threads decode a few samples ahead."""
    threads = min(8, os.cpu_count() or 1)
    pending: deque[tuple[RawSample, Future[torch.Tensor | None]]] = deque()
    size = 0
    with ThreadPoolExecutor(threads) as pool:
        for sample in samples:
            pending.append((sample, pool.submit(decode, b"" if sample.problem else sample.image, resolution)))
            size += _bytes_of(sample)
            while len(pending) > 8 * threads or (pending and size > MAX_PENDING_BYTES):
                first, future = pending.popleft()
                size -= _bytes_of(first)
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _bytes_of(sample: RawSample) -> int:
    return len(sample.image) if isinstance(sample.image, bytes) else 0


def _open_source(source: str, split: Split, resolution: int) -> Source:
    if source in EMBEDDED:
        if resolution > EMOJI_RESOLUTIONS[-1]:
            problem = f"the embedded emoji are {EMOJI_RESOLUTIONS[-1]} px wide, not {resolution}"
            raise InputError(source, problem, "use a lower resolution, or a folder of your own images")
        size = next(size for size in EMOJI_RESOLUTIONS if size >= resolution)
        return WebDatasetShards([EMOJI / f"{size}-{split}{suffix}.tar.gz" for suffix in EMBEDDED[source]])
    if not source or "://" in source or source.startswith("pipe:") or "\0" in source:
        raise InputError(source or "data", "is not a path", "name a folder, a .tar file, or use 'emoji'")
    path = Path(source).expanduser()
    with os_errors(source, "name a readable folder", "cannot be read"):
        if path.is_dir():
            return _open_folder(path, split)
        return _open_shards(splits_of_shards(_expand_shards(str(path))), split)


def _expand_shards(source: str) -> list[Path]:
    """List the shards that a path, a glob or a brace list names."""
    from braceexpand import braceexpand

    # The library expands a whole range before its first name can be looked up.
    if any(abs(int(last) - int(first)) > _MAX_SHARDS for first, last in _RANGE.findall(source)):
        raise InputError(source, f"lists more than {_MAX_SHARDS:,} shards", "write a shorter range, or name the folder")
    try:
        patterns = [source] if Path(source).exists() else braceexpand(source)
    except ValueError:
        raise InputError(source, "has an unbalanced brace", "write e.g. shards/{000..009}.tar") from None
    matches = (match for pattern in patterns for match in glob.glob(pattern) or [pattern])  # noqa: PTH207 - absolute
    return sorted({_check_shard(Path(match)) for match in matches})


def _check_shard(path: Path) -> Path:
    if not path.exists():
        problem = "matches no file" if glob.has_magic(str(path)) else "does not exist"
        raise InputError(path, problem, "check the path, or use 'emoji'")
    if not path.is_file() or not path.name.endswith(SHARDS):
        raise InputError(path, "is neither a folder of images nor a .tar shard", "name one of these, or 'emoji'")
    return path


def _open_folder(path: Path, split: Split) -> Source:
    """Open the folder's own split if it has sub-folders or shards for splits, else select the split by hash."""
    splits = splits_of_folder(path)
    if splits is None:
        shards = shards_in(path)
        return _open_shards(splits_of_shards(shards), split) if shards else ImageFolder(path, path, split)
    (root,), drawn = splits.part(split)
    if splits.val and split == "val":
        _check_class_folders(root, splits.train[0])
    shards = shards_in(root)
    source = WebDatasetShards(shards, drawn) if shards else ImageFolder(root, root.parent, drawn)
    source.notes += splits.notes
    return source


def _open_shards(splits: Splits, split: Split) -> Source:
    source = WebDatasetShards(*splits.part(split))
    source.notes += splits.notes
    return source


def _check_class_folders(validation: Path, train: Path) -> None:
    """Raise if only train has class folders, as in ImageNet, whose validation images come without them."""
    classes = any(entry.is_dir() for entry in train.iterdir())
    if classes and not any(entry.is_dir() or entry.name.endswith(SHARDS) for entry in validation.iterdir()):
        raise InputError(
            validation, "has no class folders, but train has", "sort its images into the same class folders"
        )
