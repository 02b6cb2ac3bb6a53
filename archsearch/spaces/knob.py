"""Knobs: one thing that may vary in an architecture, and what it may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
from snapgen.config import Config
from snapgen.errors import InputError

Overrides = Mapping[str, Any]
"""Paths into an architecture (`snapgen.architecture.overrides`) and the values to set there, in order."""

Field = tuple[str | int, ...]
"""One field of an architecture, e.g. ``("down", 0, "channels")``."""

_GIVEN = ("latent_channels", "context_width")
"""What the autoencoder and the text encoder decide: candidates that differ here could not be trained alike."""

_FEWEST = "give it at least two choices, or set it in the base and remove the knob"


@dataclass(frozen=True)
class Knob:
    """One thing that may vary.

    Attributes:
        name: as written in the file; a path into the architecture, or any name where each choice lists its changes.
        choices: what each choice is called, e.g. ``("2", "3", "4")`` or ``("plain", "separable ×2")``.
        settings: what each choice changes in the base, in the order of ``choices``.
        ordered: whether the choices stand in order, so that neighbouring ones are alike: each sets the same fields to
            numbers, and from one choice to the next none of them turns back. ``null`` (a key/value head for every
            query head) comes after every number. Samplers see an ordered knob as an integer, any other as a category.
    """

    name: str
    choices: tuple[str, ...]
    settings: tuple[Overrides, ...]
    ordered: bool

    def changes(self, choice: int) -> dict[str, Any]:
        """What the choice of that index changes in the base."""
        return dict(self.settings[choice])

    def fields(self, levels: int) -> dict[Field, str]:
        """Every field that any choice sets in an architecture of so many levels, and the path that names it."""
        return {
            field: path
            for changes in self.settings
            for path in changes
            for field in overrides.resolve_path(path, levels)
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        changes = [dict(changes) for changes in self.settings]
        return {"name": self.name, "choices": list(self.choices), "ordered": self.ordered, "changes": changes}

    def alternatives(self, choice: int) -> Iterator[int]:
        """The choices one step from that one: next to it where they are ordered, every other one where not."""
        near = (choice - 1, choice + 1) if self.ordered else range(len(self.choices))
        return (i for i in near if i != choice and 0 <= i < len(self.choices))

    def choice_of(self, arch: Architecture) -> int | None:
        """The choice that leaves the architecture as it is; None if each would change it."""
        made = {i: overrides.apply_overrides(arch, changes) for i, changes in self._fitting(arch)}
        exact = [i for i, other in made.items() if other == arch]
        same = [i for i, other in made.items() if other.id == arch.id]
        return next(iter(exact + same), None)

    def _fitting(self, arch: Architecture) -> Iterator[tuple[int, Overrides]]:
        for i, changes in enumerate(self.settings):
            with contextlib.suppress(ValueError):
                overrides.apply_overrides(arch, changes)
                yield i, changes

    def place(self, choice: int) -> str:
        """Where the choice stands in the file: ``knobs.qk_norm[1]``, ``knobs.convs.separable ×2``."""
        is_path = all(tuple(changes) == (self.name,) for changes in self.settings)
        return f"knobs.{self.name}[{choice}]" if is_path else f"knobs.{self.name}.{self.choices[choice]}"


def label(value: object) -> str:
    """A choice's value as YAML writes it: ``true``, ``null``, ``3``, ``2.5``, ``separable``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def read_knob(name: str, choices: object, levels: int, *, source: str) -> Knob:
    """A knob as its file has it: ``path: [value, …]`` or ``name: {label: {path: value, …}, …}``.

    Args:
        name: the key under ``knobs``.
        choices: what stands there.
        levels: of the architecture that it varies.
        source: the file, for errors.

    Raises:
        InputError: naming the choice that is wrong: an unknown path, a value of the wrong type, two alike, too few.
    """
    place = f"knobs.{name}"
    if isinstance(choices, list):
        return _path_knob(name, choices, levels, source=source, place=place)
    if isinstance(choices, dict):
        return _named_knob(name, choices, levels, source=source, place=place)
    problem = f"must be a list of choices, or labels with their changes, not {label(choices)}"
    raise InputError(source, problem, "write e.g. [true, false]", place=place)


def _path_knob(name: str, choices: list[object], levels: int, *, source: str, place: str) -> Knob:
    field = _field_of(name, levels, source=source, place=place)
    if len(choices) < 2:
        raise InputError(source, f"has {_count(choices)}", _FEWEST, place=place)
    values = [_checked(value, field, source=source, place=f"{place}[{i}]") for i, value in enumerate(choices)]
    for i, value in enumerate(values):
        if value in values[:i]:
            raise InputError(source, f"{label(value)} is there twice", "remove one", place=f"{place}[{i}]")
    settings = tuple({name: value} for value in values)
    return Knob(name, tuple(map(label, values)), settings, _in_order(settings, levels))


def _named_knob(name: str, choices: dict[object, object], levels: int, *, source: str, place: str) -> Knob:
    if len(choices) < 2:
        raise InputError(source, f"has {_count(choices)}", _FEWEST, place=place)
    labels, settings = [], []
    for key, changes in choices.items():
        if not isinstance(key, str) or not key:
            problem = f"the label {label(key)} is not text"
            raise InputError(source, problem, f"put it in quotes: '{label(key)}'", place=place)
        here = f"{place}.{key}"
        if not isinstance(changes, dict):
            problem = f"must map paths to values, not be {label(changes)}"
            raise InputError(source, problem, "write e.g. {mid.kv_heads: 1}, or {} to leave the base", place=here)
        labels.append(key)
        settings.append(read_changes(changes, levels, source=source, place=here))
    effects = [_effect(changes, levels) for changes in settings]
    for i, effect in enumerate(effects):
        if effect in effects[:i]:
            problem = f"changes just what {labels[effects.index(effect)]!r} does"
            raise InputError(source, problem, "remove one", place=f"{place}.{labels[i]}")
    return Knob(name, tuple(labels), tuple(settings), _in_order(settings, levels))


def read_changes(changes: Mapping[Any, object], levels: int, *, source: str, place: str) -> dict[str, Any]:
    """Changes as a file has them, each value checked against the field that its path sets.

    Raises:
        InputError: naming the path that is unknown or the value that is wrong.
    """
    checked = {}
    for path, value in changes.items():
        if not isinstance(path, str):
            raise InputError(source, f"{label(path)} is not a path", "write e.g. mid.kv_heads: 1", place=place)
        field = _field_of(path, levels, source=source, place=f"{place}.{path}")
        checked[path] = _checked(value, field, source=source, place=f"{place}.{path}")
    return checked


def _count(choices: Sequence[object] | Mapping[object, object]) -> str:
    return "no choices" if not choices else "a single choice"


def _field_of(path: str, levels: int, *, source: str, place: str) -> FieldInfo:
    """The model field that a path sets; where it sets several they are the same field of several stages."""
    try:
        *way, name = overrides.resolve_path(path, levels)[0]
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        raise InputError(source, problem, remedy or "correct it", place=place) from None
    if "layers" in way:
        return BlocksConfig.model_fields[overrides.COUNTS[int(name)]]
    if name in _GIVEN:
        raise InputError(source, f"{name} is the data's, not a choice", "set it in the base", place=place)
    homes: dict[str, type[Config]] = {
        "down": LevelConfig,
        "up": LevelConfig,
        "mid": BlocksConfig,
        "time": TimeEmbeddingConfig,
    }
    home = homes[str(way[0])] if way else Architecture
    return home.model_fields[str(name)]


def _checked(value: object, field: FieldInfo, *, source: str, place: str) -> Any:
    """The value as the field takes it. Strictly: YAML has true, 2 and '2' apart, and so has a person's intent."""
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = (
            error.errors(include_url=False)[0]["msg"]
            .removeprefix("Input should be ")
            .replace("a valid integer", "a whole number")
            .replace("a valid ", "a ")
        )
        shown = repr(value) if isinstance(value, str) else label(value)
        problem = f"{shown:.40} is not {wanted}"
        raise InputError(source, problem, "correct it or remove it", place=place) from None


def _effect(changes: Overrides, levels: int) -> dict[Field, Any]:
    return {field: value for path, value in changes.items() for field in overrides.resolve_path(path, levels)}


def _in_order(settings: Sequence[Overrides], levels: int) -> bool:
    effects = [_effect(changes, levels) for changes in settings]
    if any(effect.keys() != effects[0].keys() for effect in effects):
        return False
    if not all(_is_rank(value) for effect in effects for value in effect.values()):
        return False
    columns = [[math.inf if effect[field] is None else effect[field] for effect in effects] for field in effects[0]]
    return any(all(sorted(column, reverse=down) == column for column in columns) for down in (False, True))


def _is_rank(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
