"""Spaces, studies, recipes and comparisons that come with archsearch, found by name, and the schemas of such files.

People edit and read them in the folders ``spaces`` and ``studies`` at the top of a checkout, to which the links beside
this file lead; the wheel has the files themselves in their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, PrivateAttr

from snapgen.config import Config, parse_config, read_mapping
from snapgen.errors import InputError

Kind = Literal["space", "search", "ablation", "evolution", "training", "comparison"]
STUDIES: tuple[Kind, ...] = ("search", "ablation", "evolution")
"""The kinds of study, in the order in which a name without its kind is looked for."""

NOUNS: dict[Kind, str] = {
    "space": "space",
    "search": "study",
    "ablation": "ablation",
    "evolution": "evolution",
    "training": "recipe",
    "comparison": "comparison",
}
SchemaKind = Literal["study", "space", "recipe", "comparison", "architecture"]
"""The kinds of file that people write; searches, ablations and evolutions are all studies."""

RUNS = Path("runs")
"""Folder of all runs, under the current directory."""


def _check_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"{name!r:.60} cannot be a folder's name; use letters, digits, '-', '_' and '.'")
    return name


FolderName = Annotated[str, AfterValidator(_check_folder_name)]
"""A name that a run's folder can have."""


class NamedConfig(Config):
    """A study, a recipe or a comparison; it knows the file that it was read from."""

    _source: str = PrivateAttr(default="settings")
    _place: str = PrivateAttr(default="")

    @classmethod
    def parse(cls, values: object, source: str | Path, *, place: str = "") -> Self:
        """Validate values that were read from a file; see `snapgen.config.parse_config`."""
        parsed = parse_config(values, cls, source=source, place=place)
        parsed._source, parsed._place = str(source), place
        return parsed

    @property
    def source(self) -> str:
        """File that it was read from, for error messages."""
        return self._source

    @contextmanager
    def error_context(self, place: str) -> Iterator[None]:
        """Re-raise an `InputError` as one of this file's setting ``place``, which names the error's source."""
        try:
            yield
        except InputError as error:
            if error.source == self.source:
                raise
            if error.source == place:  # it names the setting already, and a place within
                texts, places = [error.problem], [self._place, place, error.place]
            else:
                texts, places = [error.source, error.place, error.problem], [self._place, place]
            problem, place = ": ".join(filter(None, texts)), ".".join(filter(None, places))
            raise InputError(self.source, problem, error.remedy, place=place) from None

    def with_changes(self, changes: Mapping[str, Any], *, source: str | None = None) -> Self:
        """A validated copy with some fields replaced.

        Args:
            source: where the changes come from, for error messages; None: the same file.
        """
        place = self._place if source is None else ""
        return self.parse({**self.model_dump(mode="json"), **changes}, source or self.source, place=place)

    def with_overrides(self, **changes: Any) -> Self:
        """A validated copy with the fields that are not None replaced."""
        overrides = {key: value for key, value in changes.items() if value is not None}
        return self.with_changes(overrides) if overrides else self


def shipped(kind: Kind) -> dict[str, Path]:
    """Files of a kind that come with archsearch, by name."""
    folder = _folder("spaces") if kind == "space" else _folder("studies") / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def schema_path(kind: str) -> Path:
    """The JSON schema of a kind of file, which `archsearch.schemas` makes.

    Raises:
        InputError: if there is no such kind; the message lists them.
    """
    if kind not in get_args(SchemaKind):
        raise InputError(kind, "is not a kind of file", f"use one of: {', '.join(get_args(SchemaKind))}")
    return Path(__file__).parent / "schemas" / f"{kind}.schema.json"


def _folder(name: str) -> Path:
    beside = Path(__file__).parent / name
    # A checkout made without symbolic links has the folder only at its top.
    return beside if beside.is_dir() else Path(__file__).parents[2] / name


def locate(name_or_path: str | Path, kinds: tuple[Kind, ...]) -> Path:
    """The file with that name or path: ``emoji``, ``ablation/emoji``, ``my_study.yaml``.

    Args:
        name_or_path: either.
        kinds: where a name is looked for, in this order; a name may say its kind, which is any of these.

    Raises:
        InputError: if it is neither; the message lists those like it, or all.
    """
    names = {name: path for kind in reversed(kinds) for name, path in shipped(kind).items()}
    names |= {f"{kind}/{name}": path for kind in kinds for name, path in shipped(kind).items()}
    path = names.get(str(name_or_path), Path(name_or_path))
    if not path.suffix and not path.exists():
        like = get_close_matches(str(name_or_path), names, 3, cutoff=0.75)
        known = ", ".join(like or (name for name in names if "/" not in name))
        noun = NOUNS[kinds[0]]
        raise InputError(name_or_path, f"is neither a shipped {noun} nor a file", f"use {known} or a YAML file")
    return path


def read_named(name_or_path: str | Path, kinds: tuple[Kind, ...]) -> tuple[Path, dict[str, Any]]:
    """The path of a study, recipe or comparison and its content, with a name where the file gives none.

    The name is the file's own; a shipped file that is not a search is named after its kind, too, so that the runs of
    ``search/emoji`` and of ``training/emoji`` have folders of their own.

    Raises:
        InputError: if there is none, or its content is not a mapping.
    """
    path = locate(name_or_path, kinds)
    values = read_mapping(path)
    kind = next((kind for kind in kinds if path in shipped(kind).values()), "search")
    values.setdefault("name", path.stem if kind == "search" else f"{kind}-{path.stem}")
    return path, values


def is_run(name: str) -> bool:
    """Whether a name is that of a run of a study under ``runs/``, rather than a shipped study or a file."""
    return name not in shipped("search") and "/" not in name and (RUNS / name / "study.db").is_file()
