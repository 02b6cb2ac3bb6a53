"""Splits of a data set by the names of its folders and shards; what is beside them is named, never trained on."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapgen.data.names import is_image, is_litter
from snapgen.data.sources import Split
from snapgen.errors import InputError

SHARDS = (".tar", ".tar.gz", ".tgz")
"""Suffixes of shards."""

_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval", "evaluation", "held-out", "heldout", "holdout", "hold-out"),
    "test": ("test", "testing"),
}
"""Names of folders by split, the first of several that are there counts. ``test`` is of no use here."""
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}
_ESCAPE = " (if it is a class, add an underscore: train_)"
_WORDS = "|".join(sorted(_KINDS, key=len, reverse=True))
_PATTERN = re.compile(rf"(?:images?[-_ ])?({_WORDS})(?:[-_ ]?(?:\d+|set|split|data|images?))?")


@dataclass(frozen=True)
class Splits:
    """The parts of a source."""

    train: list[Path]
    """A folder, or shards."""
    val: list[Path]
    """The same for the held-out images; empty if they are drawn from ``train``."""
    notes: list[str] = field(default_factory=list)
    """Phrases for the user on what is left out."""

    def part(self, split: Split) -> tuple[list[Path], Split | None]:
        """The paths of a split, and the split to draw from them by hash, if it is not a part of its own."""
        return (self.train, split) if not self.val else (self.train if split == "train" else self.val, None)


def kind_of(name: str) -> str | None:
    """The split (train, val or test) of which a folder has the name, in any case (``Valid``, ``val2017``); or None."""
    match = _PATTERN.fullmatch(name.lower())
    return _KINDS[match[1]] if match else None


def splits_of_folder(path: Path) -> Splits | None:
    """The splits in a folder that has a folder for training images, or around the only folder that does.

    Raises:
        InputError: if there are held-out images but no folder for training, or folders that may be classes or splits.
    """
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not is_litter(entry.name))
    kinds = {folder: kind for folder in folders if (kind := kind_of(folder.name))}
    train, val = (_first(kinds, kind) for kind in ("train", "val"))
    has_files = any(map(_is_data, path.iterdir()))
    if train is None:
        named = next(filter(_has_data, kinds), None)
        if named is not None:
            problem = f"has a folder {named.name} but none for training"
            raise InputError(path, problem, f"name that one train{_ESCAPE}")
        around = list(itertools.islice(filter(_has_data, folders), 2))
        return splits_of_folder(around[0]) if len(around) == 1 and not has_files else None
    others = [folder for folder in folders if folder not in (train, val) and _has_data(folder)]
    unknown = [folder.name for folder in others if folder not in kinds]
    if unknown and val is None:
        problem = f"has images in {_listed(unknown)} beside its folder {train.name}"
        raise InputError(path, problem, f"name the held-out images' folder val, and move others away{_ESCAPE}")
    left_out = [*(folder.name for folder in others), *(["images beside the folders"] if has_files else [])]
    notes = [f"left out {_listed(left_out)}; {train.name} is the training split"] if left_out else []
    return Splits([train], [val] if val else [], notes)


def check_nested(root: Path, folders: Sequence[Path]) -> None:
    """Raise if images are sorted into splits below their classes, as in ``owl/train``.

    Args:
        root: the source, in which no splits were found.
        folders: folders with images.
    """
    for folder in folders:
        name = next((part for part in folder.relative_to(root).parts if kind_of(part) == "train"), None)
        if name is not None:
            problem = f"is a folder for training below others of {root}"
            raise InputError(folder, problem, f"sort the images into {name}/… first, e.g. {name}/owl{_ESCAPE}")


def splits_of_shards(paths: Sequence[Path]) -> Splits:
    """The splits of a list of shards: those that their own or their folders' names say, if they say several."""
    kinds = {path: _shard_kind(path) for path in paths}
    by_kind = {kind: [path for path in paths if kinds[path] == kind] for kind in ("train", "val", "test", None)}
    if not by_kind["train"] or len(by_kind["train"]) == len(paths):
        return Splits(list(paths), [])
    others = [*by_kind["test"], *by_kind[None]]
    notes = [f"left out {_listed([path.name for path in others])}; shards named train are the training split"]
    return Splits(by_kind["train"], by_kind["val"], notes if others else [])


def shards_in(folder: Path) -> list[Path]:
    """The shards that lie in a folder."""
    entries = (entry for entry in folder.iterdir() if entry.name.endswith(SHARDS) and not is_litter(entry.name))
    return sorted(entry for entry in entries if entry.is_file())


def _shard_kind(path: Path) -> str | None:
    words = re.findall(r"[a-z]+", path.name.lower())
    named = {_KINDS[word] for word in words if word in _KINDS}
    return named.pop() if len(named) == 1 else kind_of(path.parent.name)


def _first(kinds: dict[Path, str], kind: str) -> Path | None:
    """The folder of a kind, by the order of `_NAMES`, then by name.

    Raises:
        InputError: if there are several for training of which none has the plain name.
    """
    names = _NAMES[kind]
    found = [folder for folder in kinds if kinds[folder] == kind]
    found.sort(key=lambda f: (names.index(f.name.lower()) if f.name.lower() in names else len(names), f.name))
    if kind == "train" and len(found) > 1 and found[0].name.lower() not in names:
        problem = f"has several folders for training: {_listed([folder.name for folder in found])}"
        raise InputError(found[0].parent, problem, "name the one to use train")
    return found[0] if found else None


def _is_data(entry: Path) -> bool:
    return (is_image(entry.name) or entry.name.endswith(SHARDS)) and not is_litter(entry.name) and not entry.is_dir()


def _has_data(folder: Path) -> bool:
    """Whether a folder has an image or a shard at any depth, or directly in a folder to which it has a link."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_litter(name)]
        links = (Path(root, name) for name in folders if Path(root, name).is_symlink())
        linked = (entry for link in links if link.is_dir() for entry in link.iterdir())
        if any(map(_is_data, (*(Path(root, name) for name in files), *linked))):
            return True
    return False


def _listed(names: Sequence[str]) -> str:
    shown = [str(name) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
