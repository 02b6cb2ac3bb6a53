"""Where captioned images come from: a folder, or webdataset shards; the samples of a split, in a fixed order."""

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


# A source without a val part of its own keeps one image in ten back, by the hash of its name.
VALIDATION_SHARE = 0.1


_WORDNET = re.compile(r"n\d{8}")


_LONGEST_CAPTION = 2000


_log = logging.getLogger(__name__)


class RawSample(NamedTuple):
    """An image, not yet decoded, and its caption; the image is empty bytes where either is missing."""

    caption: str
    image: Path | bytes


def _belongs(key: str, share: Split | None) -> bool:
    held_back = _hash(key) < VALIDATION_SHARE * 2**64
    return share is None or held_back == (share == "val")


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")


class ImageFolder:
    """Images in a folder; ``share`` is the split it is to give a tenth or nine tenths to, None for all of them."""

    broken: Sequence[str] = ()

    def __init__(self, root: Path, top: Path, share: Split | None) -> None:
        self.root, self.share = root, share
        self.listed = 0
        images, texts = self._walk()
        if not images:
            raise InputError(
                root, "holds no images", f"name a folder of {', '.join(SUFFIXES[:4])} files or .tar shards"
            )
        self.listed = len(images)
        chosen = [(key, path) for key, path in images if _belongs(key, share)]
        self.images = sorted(chosen, key=lambda item: (_hash(item[0]), str(item[1])))
        self.count = len(self.images)
        names = _class_names(top) if any(_WORDNET.fullmatch(path.parent.name) for _, path in chosen[:1]) else {}
        self.captions = [self._caption(path, texts, names) for _, path in self.images]

    def _walk(self) -> tuple[list[tuple[str, Path]], set[Path]]:
        """(Name without suffix relative to the root, file) of every image, and the stems of every .txt."""
        images: list[tuple[str, Path]] = []
        texts: set[Path] = set()
        seen = {self.root.resolve()}

        def refuse(error: OSError) -> None:
            raise InputError(error.filename, (error.strerror or "cannot be read").lower(), "make the folder readable")

        for home, folders, files in os.walk(self.root, followlinks=True, onerror=refuse):
            here = Path(home)
            # A link to a folder above would be walked for ever.
            links = {name: (here / name).resolve() for name in folders if (here / name).is_symlink()}
            folders[:] = sorted(f for f in folders if not f.startswith(".") and links.get(f) not in seen)
            seen.update(links[name] for name in folders if name in links)
            for name in files:
                path = here / name
                if name.startswith("."):
                    continue
                if name.lower().endswith(SUFFIXES):
                    images.append((path.relative_to(self.root).with_suffix("").as_posix(), path))
                elif name.endswith(".txt"):
                    texts.add(path.with_suffix(""))
        return images, texts

    def _caption(self, path: Path, texts: set[Path], names: dict[str, str]) -> str:
        if path.with_suffix("") in texts:
            written = _clean(path.with_suffix(".txt").read_bytes())
            if written:
                return written
        name = path.stem if path.parent == self.root else path.parent.name
        return names.get(name, name.replace("_", " ").strip())

    def samples(self) -> Iterator[RawSample]:
        for (_, path), caption in zip(self.images, self.captions, strict=True):
            yield RawSample(caption, path if caption else b"")

    def digest(self) -> str:
        names = [f"{key}\0{caption}" for (key, _), caption in zip(self.images, self.captions, strict=True)]
        return digest_files([path for _, path in self.images], names)

    def nothing(self, name: str, split: Split, count: int) -> InputError:
        if count:
            return InputError(
                name, f"none of its {count} images can be read", "check that the files are whole pictures"
            )
        remedy = "add images, or make folders train and val"
        return InputError(name, f"none of its {self.listed} images falls in the {split} split", remedy)


def _class_names(top: Path) -> dict[str, str]:
    """ImageNet's ``n01440764 tench, Tinca tinca`` lines, as folder → first name; a warning without them."""
    for folder in (top, *top.resolve().parents[:3]):
        file = folder / "LOC_synset_mapping.txt"
        if file.is_file():
            lines = file.read_text(errors="replace").splitlines()
            return {line[:9]: line[10:].partition(",")[0].strip() for line in lines if _WORDNET.match(line)}
    _log.warning("%s: captions are WordNet ids; put ImageNet's LOC_synset_mapping.txt beside them", top)
    return {}


class WebDatasetShards:
    """Webdataset shards; ``share`` as in `ImageFolder`."""

    count: int | None = None

    def __init__(self, paths: list[Path], share: Split | None = None) -> None:
        self.paths, self.share = paths, share
        self.broken: list[str] = []

    def samples(self) -> Iterator[RawSample]:
        # Imported here: it takes longer than everything else in this module together.
        from webdataset.tariterators import group_by_keys, tar_file_expander

        self.broken = []
        for path in self.paths:

            def note(_: Exception, path: Path = path) -> bool:
                if str(path) not in self.broken:
                    self.broken.append(str(path))
                return True

            if not _ends(path):
                note(EOFError())
            # The library would take a name like "pipe:…" for a command to run; it is handed an open file instead.
            with path.open("rb") as stream:
                files = tar_file_expander([{"url": str(path), "stream": stream}], handler=note, select_files=_wanted)
                for sample in group_by_keys(files, handler=note):
                    if _belongs(sample["__key__"], self.share):
                        yield _in_shard(sample)

    def digest(self) -> str:
        return digest_files(self.paths, [self.share or "all"])

    def nothing(self, name: str, split: Split, count: int) -> InputError:
        if self.broken and not count:
            return InputError(self.broken[0], "is no tar archive, or is cut short", "pack it or fetch it again")
        if count:
            problem = f"none of its {count} samples has an image that can be read and a caption"
            return InputError(name, problem, "pack .jpg, .png or .webp beside .txt or .json with 'caption'")
        return InputError(name, f"has no sample for the {split} split", "name more shards")


def _ends(shard: Path) -> bool:
    """Whether a plain tar has its end mark; tarfile takes a cut between two files for an end."""
    if not shard.name.endswith(".tar"):
        return True  # gzip knows
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        return file.read() == bytes(1024)


def _wanted(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, ".txt", ".json"))


def _in_shard(sample: dict[str, bytes]) -> RawSample:
    caption = _clean(sample.get("txt", b"")) or _json_caption(sample.get("json", b""))
    image = next((sample[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in sample), b"")
    return RawSample(caption, image if caption else b"")


def _json_caption(text: bytes) -> str:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    caption = facts.get("caption") if isinstance(facts, dict) else None
    return _clean(caption.encode(errors="replace")) if isinstance(caption, str) else ""


def _clean(text: bytes) -> str:
    return " ".join(text[: 4 * _LONGEST_CAPTION].decode(errors="replace").split())[:_LONGEST_CAPTION]
