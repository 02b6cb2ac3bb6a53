"""Sources of captioned images, a folder or webdataset shards, which yield the samples of a split in a fixed order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from snapgen.data.decoding import SUFFIXES
from snapgen.errors import InputError
from snapgen.io.digests import digest_files

Split = Literal["train", "val"]


# A source without a val split of its own reserves one image in ten for validation, by the hash of its name.
VALIDATION_FRACTION = 0.1


_WORDNET = re.compile(r"n\d{8}")


_MAX_CAPTION_LENGTH = 2000


_log = logging.getLogger(__name__)


class RawSample(NamedTuple):
    """An image, not yet decoded, and its caption; the image is empty bytes if either is missing."""

    caption: str
    image: Path | bytes


def _in_split(key: str, split: Split | None) -> bool:
    is_validation = _hash(key) < VALIDATION_FRACTION * 2**64
    return split is None or is_validation == (split == "val")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")


class ImageFolder:
    """Images in a folder.

    Args:
        root: the folder.
        top: folder in which the class names of WordNet ids are looked up.
        split: the split to select by hash (nine tenths or one tenth of the images); None selects all.
    """

    broken: Sequence[str] = ()
    """Files that could not be read to their end; always empty, since images fail one by one."""

    def __init__(self, root: Path, top: Path, split: Split | None) -> None:
        self.root = root
        images, texts = self._walk()
        if not images:
            raise InputError(
                root, "holds no images", f"name a folder of {', '.join(SUFFIXES[:4])} files or .tar shards"
            )
        self._total = len(images)
        selected = [(key, path) for key, path in images if _in_split(key, split)]
        self.images = sorted(selected, key=lambda item: (_hash(item[0]), str(item[1])))
        self.count = len(self.images)
        names = _class_names(top) if any(_WORDNET.fullmatch(path.parent.name) for _, path in selected[:1]) else {}
        self.captions = [self._caption(path, texts, names) for _, path in self.images]

    def _walk(self) -> tuple[list[tuple[str, Path]], set[Path]]:
        """List images as (relative path without suffix, path), and .txt files without their suffix."""
        images: list[tuple[str, Path]] = []
        texts: set[Path] = set()
        visited = {self.root.resolve()}

        def fail(error: OSError) -> None:
            raise InputError(error.filename, (error.strerror or "cannot be read").lower(), "make the folder readable")

        for name_of_folder, folders, files in os.walk(self.root, followlinks=True, onerror=fail):
            folder = Path(name_of_folder)
            # A link to a parent folder would otherwise be followed forever.
            links = {name: (folder / name).resolve() for name in folders if (folder / name).is_symlink()}
            folders[:] = sorted(f for f in folders if not f.startswith(".") and links.get(f) not in visited)
            visited.update(links[name] for name in folders if name in links)
            for name in files:
                path = folder / name
                if name.startswith("."):
                    continue
                if name.lower().endswith(SUFFIXES):
                    images.append((path.relative_to(self.root).with_suffix("").as_posix(), path))
                elif name.endswith(".txt"):
                    texts.add(path.with_suffix(""))
        return images, texts

    def _caption(self, path: Path, texts: set[Path], names: dict[str, str]) -> str:
        if path.with_suffix("") in texts:
            caption = _clean(path.with_suffix(".txt").read_bytes())
            if caption:
                return caption
        name = path.stem if path.parent == self.root else path.parent.name
        return names.get(name, name.replace("_", " ").strip())

    def samples(self) -> Iterator[RawSample]:
        """Yield the samples in a fixed order, sorted by hash."""
        for (_, path), caption in zip(self.images, self.captions, strict=True):
            yield RawSample(caption, path if caption else b"")

    def digest(self) -> str:
        """16 hex digits of a hash of the images and captions."""
        names = [f"{key}\0{caption}" for (key, _), caption in zip(self.images, self.captions, strict=True)]
        return digest_files([path for _, path in self.images], names)

    def empty_error(self, name: str, split: Split, count: int) -> InputError:
        """Error for a split without a readable image; ``count`` is the number of samples that were tried."""
        if count:
            return InputError(name, f"none of its {count} images can be read", "check that the files are not damaged")
        remedy = "add images, or create folders train and val"
        return InputError(name, f"none of its {self._total} images falls in the {split} split", remedy)


def _class_names(top: Path) -> dict[str, str]:
    """Map WordNet ids to class names from ImageNet's list (``n01440764 tench, Tinca tinca``); warn without it."""
    for folder in (top, *top.resolve().parents[:3]):
        file = folder / "LOC_synset_mapping.txt"
        if file.is_file():
            lines = file.read_text(errors="replace").splitlines()
            return {line[:9]: line[10:].partition(",")[0].strip() for line in lines if _WORDNET.match(line)}
    _log.warning("%s: captions are WordNet ids; put ImageNet's LOC_synset_mapping.txt beside them", top)
    return {}


class WebDatasetShards:
    """Images in webdataset shards.

    Args:
        paths: the shards.
        split: as in `ImageFolder`.
    """

    count: int | None = None
    """Number of samples, which is unknown before the shards are read."""

    def __init__(self, paths: list[Path], split: Split | None = None) -> None:
        self.paths, self.split = paths, split
        self.broken: list[str] = []
        """Shards that are damaged or truncated, known after `samples`."""

    def samples(self) -> Iterator[RawSample]:
        """Yield the samples in the order of the shards."""
        # Imported here: the import takes longer than all others of this module together.
        from webdataset.tariterators import group_by_keys, tar_file_expander

        self.broken = []
        for path in self.paths:

            def mark_broken(_: Exception, path: Path = path) -> bool:
                if str(path) not in self.broken:
                    self.broken.append(str(path))
                return True

            if not _has_end_mark(path):
                mark_broken(EOFError())
            # Pass an open file: the library would run a name such as "pipe:…" as a command.
            with path.open("rb") as stream:
                files = tar_file_expander(
                    [{"url": str(path), "stream": stream}], handler=mark_broken, select_files=_is_sample_file
                )
                for sample in group_by_keys(files, handler=mark_broken):
                    if _in_split(sample["__key__"], self.split):
                        caption = _clean(sample.get("txt", b"")) or _json_caption(sample.get("json", b""))
                        image = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), b"")
                        yield RawSample(caption, image if caption else b"")

    def digest(self) -> str:
        """16 hex digits of a hash of the shards and the split."""
        return digest_files(self.paths, [self.split or "all"])

    def empty_error(self, name: str, split: Split, count: int) -> InputError:
        """Error for a split without a readable image; ``count`` is the number of samples that were tried."""
        if self.broken and not count:
            return InputError(self.broken[0], "is not a tar archive, or is truncated", "create or download it again")
        if count:
            problem = f"none of its {count} samples has both a readable image and a caption"
            return InputError(name, problem, "add .jpg, .png or .webp, and .txt or .json with 'caption'")
        return InputError(name, f"has no sample for the {split} split", "name more shards")


def _has_end_mark(shard: Path) -> bool:
    """Whether an uncompressed tar has its end mark; tarfile does not notice a file truncated between two members."""
    if not shard.name.endswith(".tar"):
        return True  # gzip detects truncation itself
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        return file.read() == bytes(1024)


def _is_sample_file(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, ".txt", ".json"))


def _json_caption(text: bytes) -> str:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    caption = metadata.get("caption") if isinstance(metadata, dict) else None
    return _clean(caption.encode(errors="replace")) if isinstance(caption, str) else ""


def _clean(text: bytes) -> str:
    return " ".join(text[: 4 * _MAX_CAPTION_LENGTH].decode(errors="replace").split())[:_MAX_CAPTION_LENGTH]
