"""Knobs: one varying choice of an architecture, with its possible values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture, BlocksConfig, LevelConfig, TimeEmbeddingConfig
from snapgen.config import Config, problem_and_remedy
from snapgen.errors import InputError

Overrides = Mapping[str, Any]
"""Paths into an architecture (`snapgen.architecture.overrides`) and the values to set there, in order."""

Field = tuple[str | int, ...]
"""One field of an architecture, e.g. ``("down", 0, "channels")``."""

_SET_BY_DATA = ("latent_channels", "context_dim")
"""Fields fixed by the autoencoder and the text encoder; candidates that differ in them cannot share training data."""

_NEEDS_TWO_CHOICES = "give it at least two choices, or set it in the base and remove the knob"
"""Remedy for a knob with fewer than two choices."""


@dataclass(frozen=True)
class Knob:
    """One varying choice of an architecture.

    Attributes:
        name: name in the space's file: a path into the architecture, or any name if each choice lists its changes.
        choices: label of each choice, e.g. ``("2", "3", "4")`` or ``("plain", "separable ×2")``.
        settings: overrides of the base for each choice, in the order of ``choices``.
        ordered: whether adjacent choices are similar: every choice sets the same fields to numbers, and each field
            changes monotonically from one choice to the next. ``null`` (one key/value head per query head) counts as
            larger than every number. Samplers treat an ordered knob as an integer and any other as categorical.
    """

    name: str
    choices: tuple[str, ...]
    settings: tuple[Overrides, ...]
    ordered: bool

    def changes(self, choice: int) -> dict[str, Any]:
        """Overrides of the base for the choice with that index."""
        return dict(self.settings[choice])

    def fields(self, levels: int) -> dict[Field, str]:
        """Every field that any choice sets in an architecture with that number of levels, and the path that sets it."""
        return {
            field: path
            for changes in self.settings
            for path in changes
            for field in overrides.resolve_path(path, levels)
        }

    def to_dict(self) -> dict[str, Any]:
        """The knob as JSON-serializable data."""
        changes = [dict(changes) for changes in self.settings]
        return {"name": self.name, "choices": list(self.choices), "ordered": self.ordered, "changes": changes}

    def adjacent_choices(self, choice: int) -> Iterator[int]:
        """Choices one step away: the direct neighbors of an ordered knob, every other choice of an unordered one."""
        candidates = (choice - 1, choice + 1) if self.ordered else range(len(self.choices))
        return (i for i in candidates if i != choice and 0 <= i < len(self.choices))

    def current_choice(self, arch: Architecture) -> int | None:
        """The choice that leaves the architecture unchanged, of several that which sets the most fields.

        A choice that sets nothing stands for the base's fields, and changes no architecture.

        Returns:
            Its index; None if every choice changes the architecture.
        """
        ranked = sorted(range(len(self.settings)), key=lambda i: -len(self.settings[i]))
        exact = (i for i in ranked if overrides.are_applied(arch, self.settings[i]))
        same_net = (i for i in ranked if self._gives_the_net_of(arch, i))
        return next(itertools.chain(exact, same_net), None)

    def _gives_the_net_of(self, arch: Architecture, choice: int) -> bool:
        """Whether the architecture is the same network with that choice."""
        try:
            return overrides.apply_overrides(arch, self.settings[choice]).id == arch.id
        except ValueError:
            return False

    def location(self, choice: int) -> str:
        """Location of the choice in the file, e.g. ``knobs.qk_norm[1]`` or ``knobs.convs.separable ×2``."""
        is_path = all(tuple(changes) == (self.name,) for changes in self.settings)
        return f"knobs.{self.name}[{choice}]" if is_path else f"knobs.{self.name}.{self.choices[choice]}"


def label(value: object) -> str:
    """A choice's value in YAML notation: ``true``, ``null``, ``3``, ``2.5``, ``separable``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def read_knob(name: str, choices: object, levels: int, *, source: str) -> Knob:
    """Parse a knob from a space's file: ``path: [value, …]`` or ``name: {label: {path: value, …}, …}``.

    Args:
        name: key under ``knobs``.
        choices: value of that key.
        levels: number of resolution levels of the base architecture.
        source: path of the file, for error messages.

    Raises:
        InputError: naming the invalid choice: an unknown path, a value of the wrong type, a duplicate, or too few
            choices.
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
        raise InputError(source, f"has {_count(choices)}", _NEEDS_TWO_CHOICES, place=place)
    values = [_checked(value, field, source=source, place=f"{place}[{i}]") for i, value in enumerate(choices)]
    for i, value in enumerate(values):
        if value in values[:i]:
            raise InputError(source, f"{label(value)} is listed twice", "remove one", place=f"{place}[{i}]")
    settings = tuple({name: value} for value in values)
    return Knob(name, tuple(map(label, values)), settings, _in_order(settings, levels))


def _named_knob(name: str, choices: dict[object, object], levels: int, *, source: str, place: str) -> Knob:
    if len(choices) < 2:
        raise InputError(source, f"has {_count(choices)}", _NEEDS_TWO_CHOICES, place=place)
    labels, settings = [], []
    for key, changes in choices.items():
        if not isinstance(key, str) or not key:
            problem = f"the label {label(key)} is not text"
            raise InputError(source, problem, f"put it in quotes: '{label(key)}'", place=place)
        here = f"{place}.{key}"
        if not isinstance(changes, dict):
            problem = f"must map paths to values, not be {label(changes)}"
            raise InputError(source, problem, "write e.g. {mid.num_kv_heads: 1}, or {} to leave the base", place=here)
        labels.append(key)
        settings.append(read_changes(changes, levels, source=source, place=here))
    effects = [_effect(changes, levels) for changes in settings]
    for i, effect in enumerate(effects):
        if effect in effects[:i]:
            problem = f"changes the same fields to the same values as {labels[effects.index(effect)]!r}"
            raise InputError(source, problem, "remove one", place=f"{place}.{labels[i]}")
    return Knob(name, tuple(labels), tuple(settings), _in_order(settings, levels))


def read_changes(changes: Mapping[Any, object], levels: int, *, source: str, place: str) -> dict[str, Any]:
    """Parse overrides from a file, checking each value against the field that its path sets.

    Raises:
        InputError: naming the unknown path or the invalid value.
    """
    checked = {}
    for path, value in changes.items():
        if not isinstance(path, str):
            raise InputError(source, f"{label(path)} is not a path", "write e.g. mid.num_kv_heads: 1", place=place)
        field = _field_of(path, levels, source=source, place=f"{place}.{path}")
        checked[path] = _checked(value, field, source=source, place=f"{place}.{path}")
    return checked


def _count(choices: Sequence[object] | Mapping[object, object]) -> str:
    return "no choices" if not choices else "a single choice"


def _field_of(path: str, levels: int, *, source: str, place: str) -> FieldInfo:
    """The pydantic field that a path sets. A path that sets several fields sets the same field of several levels."""
    try:
        *parents, name = overrides.resolve_path(path, levels)[0]
    except ValueError as error:
        problem, _, remedy = str(error).partition("; ")
        raise InputError(source, problem, remedy or "correct it", place=place) from None
    if "layers" in parents:
        return BlocksConfig.model_fields[overrides.COUNTS[int(name)]]
    if name in _SET_BY_DATA:
        raise InputError(source, f"{name} is determined by the data, not a choice", "set it in the base", place=place)
    config_classes: dict[str, type[Config]] = {
        "down": LevelConfig,
        "up": LevelConfig,
        "mid": BlocksConfig,
        "time": TimeEmbeddingConfig,
    }
    config_class = config_classes[str(parents[0])] if parents else Architecture
    return config_class.model_fields[str(name)]


def _checked(value: object, field: FieldInfo, *, source: str, place: str) -> Any:
    """The value validated against the field. Strict, because YAML distinguishes true, 2 and '2', and so do users."""
    field_type: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(field_type).validate_python(value, strict=True)
    except ValidationError as error:
        problem, remedy = problem_and_remedy(error)
        raise InputError(source, problem, f"{remedy}, or remove it", place=place) from None


def _effect(changes: Overrides, levels: int) -> dict[Field, Any]:
    return {field: value for path, value in changes.items() for field in overrides.resolve_path(path, levels)}


def _in_order(settings: Sequence[Overrides], levels: int) -> bool:
    """Whether all choices set the same fields to numbers, each non-decreasing or each non-increasing."""
    effects = [_effect(changes, levels) for changes in settings]
    if any(effect.keys() != effects[0].keys() for effect in effects):
        return False
    values = (value for effect in effects for value in effect.values())
    if not all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        return False
    # null (one key/value head per query head) sorts after every number
    columns = [[math.inf if effect[field] is None else effect[field] for effect in effects] for field in effects[0]]
    return any(all(sorted(column, reverse=falling) == column for column in columns) for falling in (False, True))
