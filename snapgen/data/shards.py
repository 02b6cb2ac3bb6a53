"""Webdataset shards: tar files whose members are images and, under the same name, their captions.

The webdataset package groups neighboring members up to the first dot of their names, so that ``v1.0_a.jpg`` and
``v1.0_b.jpg`` fall together, and a caption that does not follow its image is lost. Here a member's own suffix alone is
cut off, and a shard is read twice: once for the captions, once for the images.
"""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path, PurePosixPath
from typing import Self

from snapgen import files
from snapgen.data.caption_files import caption_of
from snapgen.data.names import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    caption_stem,
    is_image,
    is_litter_path,
    without_suffix,
)
from snapgen.data.sources import RawSample, Source, Split, in_split
from snapgen.errors import InputError, os_errors
from snapgen.findings import Findings
from snapgen.io.digests import digest_files

MAX_RATIO, FREE_BYTES = 100, 1 << 26
"""A packed shard may unpack to so many times its size, and so many bytes more."""
MAX_CAPTION_BYTES = 1 << 28
"""Size of all captions of a shard, which are kept."""
_GZIP = b"\x1f\x8b"
_NO_CAPTION = "have no caption (a .txt of the same name, or a .json with 'caption')"


class WebDatasetShards(Source):
    """Images in webdataset shards.

    Args:
        paths: the shards.
        split: the split to select by the hash of the images' names; None selects all.
    """

    def __init__(self, paths: list[Path], split: Split | None = None) -> None:
        super().__init__()
        self.paths, self.split = paths, split
        if split is not None:
            self.notes.append("held out one image in ten, by the hash of their names, as there are no shards named val")

    def samples(self) -> Iterator[RawSample]:
        """Yield the samples in the order of the shards and of the images within them."""
        self.broken, self.remarks = [], Findings()
        for path in self.paths:
            contents = _Contents(path, self._files(path, _is_caption), self.remarks)
            for number, (name, image) in enumerate(self._files(path, contents.images)):
                if contents.images.get(name) != number or not in_split(without_suffix(name), self.split):
                    continue
                caption, problem = contents.caption(name)
                yield RawSample(caption, b"" if problem else image, f"{name} in {path.name}", problem)

    def digest(self) -> str:
        return digest_files(self.paths, [self.split or "all"])

    def empty_error(self, name: str, split: Split) -> InputError:
        if self.broken:
            return InputError(self.broken[0], "is not a tar archive, or is truncated", "create or download it again")
        found = f" ({self.remarks})" if self.remarks.total else ""
        return InputError(name, f"has no sample for the {split} split{found}", "name more shards")

    def _files(self, path: Path, read: Container[str] | Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Names of a shard's files in order, up to any damage, with the contents of those that are to be read."""
        wanted = read if callable(read) else read.__contains__
        with os_errors(path, "make it readable", "cannot be read"):
            if not _has_end_mark(path):
                self._mark_broken(path)
        member = None
        try:
            with _Unpacked(path) as content, tarfile.TarFile(fileobj=content) as tar:  # type: ignore[arg-type]
                for member in tar:
                    if member.isdir() or is_litter_path(member.name):
                        continue
                    readable = wanted(member.name) and not member.issparse() and member.size <= files.MAX_BYTES
                    file = tar.extractfile(member) if readable else None
                    yield member.name, b"" if file is None else file.read()
        except InputError as error:
            place = f"from {member.name} on" if member else ""
            raise InputError(path, error.problem, error.remedy, place=place) from None
        except (tarfile.TarError, EOFError, OSError, zlib.error, KeyError, ValueError):
            self._mark_broken(path)

    def _mark_broken(self, path: Path) -> None:
        if str(path) not in self.broken:
            self.broken.append(str(path))


class _Unpacked:
    """Content of a shard, unpacked: no part of it is read that memory might not hold, and not many times its size."""

    def __init__(self, path: Path) -> None:
        self._path, self._raw = path, os.fdopen(files.open_regular(path), "rb")
        is_packed = self._raw.read(len(_GZIP)) == _GZIP
        self._raw.seek(0)
        self._file = gzip.GzipFile(fileobj=self._raw) if is_packed else self._raw
        self._limit = MAX_RATIO * path.stat().st_size + FREE_BYTES if is_packed else math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        self._check(size <= files.MAX_BYTES and self.tell() + size <= self._limit)
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position <= self._limit)
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, fits: bool) -> None:
        if not fits:
            problem = f"unpacks to more than {MAX_RATIO} times its size, or to a part larger than is read"
            raise InputError(self._path, problem, "create it again without that part")


class _Contents:
    """The images of a shard and their captions, from one pass over its files."""

    def __init__(self, path: Path, members: Iterator[tuple[str, bytes]], remarks: Findings) -> None:
        self.images: dict[str, int] = {}
        """Position of each image among the files; the last of several of the same name, as tar unpacks it."""
        texts: dict[str, dict[str, tuple[str, bytes]]] = {}
        size = 0
        for number, (name, content) in enumerate(members):
            size += len(content)
            if size > MAX_CAPTION_BYTES:
                problem = f"holds captions of more than {MAX_CAPTION_BYTES >> 20} MiB"
                raise InputError(path, problem, "leave out what is no caption", place=name)
            if is_image(name):
                if name in self.images:
                    remarks.add("are there twice, of which the last counts", f"{name} in {path.name}")
                self.images[name] = number
            elif name.lower().endswith(UNREAD_SUFFIXES):
                remarks.add(f"are {PurePosixPath(name).suffix.lower()}, which is not read", f"{name} in {path.name}")
            else:
                found = caption_stem(name)
                if found is not None:
                    texts.setdefault(found[0], {})[found[1]] = name, content
        self._texts = texts
        self._first = self._first_of_samples()
        stems = {stem for name in self.images for stem in (name, without_suffix(name))}
        for stem in sorted(texts.keys() - stems):
            name = next(iter(texts[stem].values()))[0]
            remarks.add("are captions without an image", f"{name} in {path.name}")

    def caption(self, image: str) -> tuple[str, str]:
        """The caption of an image, or the problem why it cannot be used, as a predicate of several."""
        stem = without_suffix(image)
        if self._first[stem] != image:
            return "", "are a further image of their sample"
        problem = _NO_CAPTION
        for suffix in CAPTION_SUFFIXES:
            for key in (image, stem):
                _, content = self._texts.get(key, {}).get(suffix, ("", b""))
                try:
                    caption = caption_of(content, suffix)
                except ValueError:
                    caption, problem = "", "have a caption that is not UTF-8"
                if caption:
                    return caption, ""
        base = PurePosixPath(stem).with_name(PurePosixPath(stem).name.partition(".")[0])
        if stem != str(base) and str(base) in self._first:  # e.g. 0001.seg.png beside 0001.jpg
            problem = "are a further image of their sample"
        return "", problem

    def _first_of_samples(self) -> dict[str, str]:
        """The image that counts of those that share a name: the first suffix of `IMAGE_SUFFIXES`."""
        ordered = sorted(self.images, key=lambda name: IMAGE_SUFFIXES.index(_suffix(name)))
        first: dict[str, str] = {}
        for name in ordered:
            first.setdefault(without_suffix(name), name)
        return first


def _suffix(name: str) -> str:
    return next(suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix))


def _is_caption(name: str) -> bool:
    return caption_stem(name) is not None


def _has_end_mark(shard: Path) -> bool:
    """Whether an uncompressed tar has its end mark; tarfile does not notice a file truncated between two members."""
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        return file.read() == bytes(1024) or not shard.name.endswith(".tar")  # gzip detects truncation itself
