"""Folders of images, with captions from files beside them, from tables, or from the names of files and folders."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from snapgen.data.caption_files import MAX_CAPTION_LENGTH, caption_in, is_table, read_table, read_text
from snapgen.data.names import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    UNREAD_SUFFIXES,
    caption_stem,
    is_image,
    is_litter,
    without_suffix,
    without_thumbnails,
)
from snapgen.data.sources import NOT_USED, RawSample, Source, Split, hash_of, in_split
from snapgen.data.splits import check_nested
from snapgen.errors import InputError
from snapgen.findings import Findings
from snapgen.io.digests import digest_files

MANY_ORPHANS = 3
"""Number of texts beside no image from which they may be captions, rather than a README and a licence."""
_WORDNET = re.compile(r"n\d{8}")
_log = logging.getLogger(__name__)


@dataclass
class _Listing:
    """Files of a folder and those below it."""

    images: list[tuple[str, Path]] = field(default_factory=list)
    """Relative path without suffix, and path."""
    texts: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Files with captions by suffix, by their path without it."""
    tables: list[Path] = field(default_factory=list)
    """Tables, those of outer folders first."""
    unread: Findings = field(default_factory=Findings)


class ImageFolder(Source):
    """Images in a folder.

    Args:
        root: the folder.
        top: folder of the whole source, in which class names of WordNet ids and tables are looked up, too.
        split: the split to select by hash (nine tenths or one tenth of the images); None selects all.
    """

    def __init__(self, root: Path, top: Path, split: Split | None) -> None:
        super().__init__()
        self.root = root
        listing = _list(root)
        if not listing.images:
            unread = f" of a kind that is read ({listing.unread})" if listing.unread.total else ""
            remedy = f"name a folder of {', '.join(IMAGE_SUFFIXES[:4])} files or .tar shards"
            raise InputError(root, f"holds no images{unread}", remedy)
        if split is not None:
            check_nested(root, list(dict.fromkeys(path.parent for _, path in listing.images)))
        self._total = len(listing.images)
        selected = [(key, path) for key, path in listing.images if in_split(key, split)]
        self.images = sorted(selected, key=lambda item: (hash_of(item[0]), str(item[1])))
        self.count = len(self.images)
        names = _class_names(top) if any(_WORDNET.fullmatch(path.parent.name) for _, path in selected[:1]) else {}
        captions = FolderCaptions(root, listing, top, names)
        self.captions = [captions.caption(path) for _, path in self.images]
        if split is not None:
            held_out = sum(in_split(key, "val") for key, _ in listing.images)
            self.notes.append(
                f"held out {held_out:,} of {self._total:,} images, by the hash of their names: there is no folder val"
            )
        self.notes += captions.notes()
        if listing.unread.total:
            self.notes.append(f"{NOT_USED}: {listing.unread}")

    def samples(self) -> Iterator[RawSample]:
        """Yield the samples in a fixed order, sorted by hash."""
        for (_, path), caption in zip(self.images, self.captions, strict=True):
            yield RawSample(caption, path, str(path.relative_to(self.root)), "" if caption else "have no caption")

    def digest(self) -> str:
        names = [f"{key}\0{caption}" for (key, _), caption in zip(self.images, self.captions, strict=True)]
        return digest_files([path for _, path in self.images], names)

    def empty_error(self, name: str, split: Split) -> InputError:
        remedy = "add images, or create folders train and val"
        return InputError(name, f"none of its {self._total} images falls in the {split} split", remedy)


def _list(root: Path) -> _Listing:
    """List the files of a folder and of those below it, links included, without what programs leave."""
    listing, visited = _Listing(), {root.resolve()}

    def fail(error: OSError) -> None:
        raise InputError(error.filename, (error.strerror or "cannot be read").lower(), "make the folder readable")

    for name_of_folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        folder = Path(name_of_folder)
        files = [name for name in files if not is_litter(name)]
        # A link to a parent folder would otherwise be followed forever.
        links = {name: (folder / name).resolve() for name in folders if (folder / name).is_symlink()}
        retained = sorted(name for name in folders if not is_litter(name) and links.get(name) not in visited)
        folders[:] = without_thumbnails(retained, beside_images=any(map(is_image, files)))
        visited.update(links[name] for name in folders if name in links)
        for name in files:
            _add(listing, root, folder / name)
    listing.tables.sort(key=lambda path: len(path.parts))
    return listing


def _add(listing: _Listing, root: Path, path: Path) -> None:
    """Add a file to a listing by its name."""
    if is_image(path.name):
        listing.images.append((path.relative_to(root).with_suffix("").as_posix(), path))
        return
    if path.name.lower().endswith(UNREAD_SUFFIXES):
        listing.unread.add(f"are {path.suffix.lower()}, which is not read", str(path.relative_to(root)))
    if is_table(path.name):
        listing.tables.append(path)
    found = caption_stem(str(path))
    if found is not None:
        stem, suffix = found
        listing.texts.setdefault(stem, {})[suffix] = path


class FolderCaptions:
    """Captions of a folder's images.

    A file beside the image (``fox.txt``, ``fox.png.txt``, ``fox.caption``, ``fox.json``) takes precedence over a table
    (``metadata.jsonl``, ``captions.csv``), and both over the names of files and folders.

    Args:
        root: the folder.
        listing: its files.
        top: another folder whose tables count, too.
        class_names: names of the folders that are WordNet ids.
    """

    def __init__(self, root: Path, listing: _Listing, top: Path, class_names: dict[str, str]) -> None:
        self._root, self._listing, self._class_names = root, listing, class_names
        outer = [] if top == root else sorted(path for path in top.iterdir() if path.is_file() and is_table(path.name))
        self._by_path: dict[str, tuple[str, str]] = {}
        self._findings = Findings()
        self._own = 0
        self._named: list[Path] = []
        for table in [*outer, *listing.tables]:
            self._read(table)
        self._by_name = self._unique_names() if self._by_path else {}

    def caption(self, path: Path) -> str:
        """The caption of an image; empty if it has none."""
        caption = self._beside(path) or self._in_table(path)
        if caption:
            self._own += 1
            if len(caption) == MAX_CAPTION_LENGTH:
                self._findings.add(f"captions are cut to {MAX_CAPTION_LENGTH:,} characters", self._name(path))
            return caption
        self._named.append(path)
        return self._of_names(path)

    def notes(self) -> list[str]:
        """Notes for the user on the captions that were asked for."""
        notes = [str(self._findings)] if self._findings.total else []
        orphans = sorted(self._orphans()) if self._named else []
        if self._named and (self._own or self._by_path or len(orphans) >= MANY_ORPHANS):
            problem = f"{len(self._named):,} images have no caption of their own"
            notes.insert(0, f"{problem} and take a name as caption, e.g. {self._name(self._named[0])}")
            if orphans:
                notes.append(f"{len(orphans):,} caption files belong to no image, e.g. {self._name(Path(orphans[0]))}")
        missing = sorted(self._missing())
        if missing:
            notes.append(f"{len(missing):,} rows of tables name files that are not there, e.g. {missing[0]}")
        return notes

    def _beside(self, path: Path) -> str:
        """The caption in a file beside an image, whose name has the image's suffix or not."""
        for suffix in CAPTION_SUFFIXES:
            for stem in (str(path), without_suffix(str(path))):
                file = self._listing.texts.get(stem, {}).get(suffix)
                caption = "" if file is None else caption_in(read_text(file), suffix)
                if caption:
                    return caption
        return ""

    def _in_table(self, path: Path) -> str:
        for key in (os.path.normpath(path), without_suffix(os.path.normpath(path))):
            if key in self._by_path:
                return self._by_path[key][0]
        row = self._by_name.get(path.name)
        return "" if row is None else self._by_path[row][0]

    def _of_names(self, path: Path) -> str:
        name = path.stem if path.parent == self._root else path.parent.name
        try:
            name.encode()
        except UnicodeEncodeError:
            owner = path if path.parent == self._root else path.parent
            raise InputError(owner, "has a name that is not UTF-8", "rename it; it is a caption") from None
        return self._class_names.get(name, name.replace("_", " ").strip())

    def _read(self, table: Path) -> None:
        """Add the rows of a table; those of inner folders replace those of outer ones."""
        own: set[str] = set()
        for place, name, caption in read_table(table):
            key = os.path.normpath(table.parent / name.replace("\\", "/"))
            if key in own:
                self._findings.add("rows are further captions of an image and do not count", f"{table.name}: {place}")
                continue
            own.add(key)
            self._by_path[key] = caption, f"{name} in {table.name}"

    def _unique_names(self) -> dict[str, str]:
        """Rows by the name of their file, where no other row or image has it: for tables beside the images' folder."""
        rows = Counter(Path(key).name for key in self._by_path)
        images = Counter(path.name for _, path in self._listing.images)
        return {
            Path(key).name: key
            for key in self._by_path
            if rows[Path(key).name] == 1 == images[Path(key).name] and not Path(key).exists()
        }

    def _orphans(self) -> set[str]:
        """Files of one caption that belong to no image."""
        images = {stem for _, path in self._listing.images for stem in (str(path), without_suffix(str(path)))}
        texts = self._listing.texts.items()
        return {str(files[s]) for stem, files in texts if stem not in images for s in TEXT_SUFFIXES if s in files}

    def _missing(self) -> set[str]:
        """Rows of tables whose file is not there, under any of the names by which an image is looked up."""
        images = {os.path.normpath(path) for _, path in self._listing.images} if self._by_path else set()
        known = images | set(map(without_suffix, images)) | set(self._by_name.values())
        return {row for key, (_, row) in self._by_path.items() if key not in known and not Path(key).exists()}

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))


def _class_names(top: Path) -> dict[str, str]:
    """Map WordNet ids to class names from ImageNet's list (``n01440764 tench, Tinca tinca``); warn without it."""
    for folder in (top, *top.resolve().parents[:3]):
        file = folder / "LOC_synset_mapping.txt"
        if file.is_file():
            lines = read_text(file).splitlines()
            return {line[:9]: line[10:].partition(",")[0].strip() for line in lines if _WORDNET.match(line)}
    _log.warning("%s: captions are WordNet ids; put ImageNet's LOC_synset_mapping.txt beside them", top)
    return {}
