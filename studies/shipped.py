"""What lies beside the studies: found by its name, or one's own by its path."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from snapgen import settings as reading
from snapgen.errors import InputError

Kind = Literal["study", "recipe", "comparison"]
PREFIXES: dict[Kind, str] = {"recipe": "train_", "comparison": "compare_"}
"""How the names of recipes and of comparisons begin; what begins otherwise is a study."""


def _for_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"{name!r:.60} does not do for a folder; use letters, digits, '-', '_' and '.'")
    return name


FolderName = Annotated[str, AfterValidator(_for_a_folder)]
"""A name that a run's folder can have."""


def shipped(kind: Kind) -> dict[str, Path]:
    """Those of a kind that come with archsearch, by name."""
    paths = sorted(Path(str(resources.files("studies"))).glob("*.yaml"))
    if kind in PREFIXES:
        return {path.stem: path for path in paths if path.stem.startswith(PREFIXES[kind])}
    return {path.stem: path for path in paths if not path.stem.startswith(tuple(PREFIXES.values()))}


def read(name_or_path: str | Path, kind: Kind) -> tuple[Path, dict[str, Any]]:
    """The file of that name or path, and what is in it; without a name of its own it has its file's.

    Raises:
        InputError: if there is none, or it is no mapping.
    """
    known = shipped(kind)
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.suffix and not path.exists():
        names = ", ".join(known)
        raise InputError(name_or_path, f"is neither a shipped {kind} nor a file", f"use {names} or a YAML file")
    values = reading.read_mapping(path)
    values.setdefault("name", path.stem)
    return path, values
