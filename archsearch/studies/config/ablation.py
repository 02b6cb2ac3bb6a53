"""The rows of an ablation: a base, changes row upon row, each choice alone, and the final design without each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.errors import InputError

if TYPE_CHECKING:
    from archsearch.spaces.space import Space

Group = Literal["ladder", "without", "alone"]

Quantity = Literal["params", "macs", "latency_ms", "frechet_distance"]
"""What may have been published of a row."""


class PublishedNumber(Config):
    """A number of a row as its paper has it; never ours."""

    value: float | None = None
    """Change against the row below in percent (params, macs, latency_ms); the FID itself (frechet_distance)."""
    says: str = ""
    """The paper's way to put it, or its words where it gives no number."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.value is None and not self.says:
            raise ValueError("neither value nor says; give one or remove it")
        return self


class AblationRowConfig(Config):
    """One row as the YAML has it."""

    title: str
    over: str | None = None
    """The row that it changes; None for the base alone."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Paths into the architecture (`snapgen.architecture.overrides`) and the values to set there."""
    published: dict[Quantity, PublishedNumber] = Field(default_factory=dict)


class AblationConfig(Config):
    """An ablation: the ladder of rows, and what is derived from it."""

    rows: dict[str, AblationRowConfig] = Field(min_length=2)
    """In the ladder's order; the first is the base."""
    final: str
    """The row that `without` and `alone` look at: the ladder from it down to the base is its *choices*."""
    without: bool = True
    """Leave one out: the final row with each of its choices reverted."""
    alone: bool = False
    """The base with each choice alone: with it single effects can be added up against the joint one."""
    turns: int = Field(default=0, ge=0)
    """At most so many more measurements of every row's latency, all rows in turn, until the two lowest agree: nets of a
    millisecond are easily disturbed by what else the machine does. 0: the one that its score has."""
    published_from: str | None = None
    """Another ablation (a shipped one's name, or a file) whose published numbers stand beside rows of the same name."""
    published_source: str = ""
    """Where the published numbers are from."""
    published_protocol: str = ""
    """How they were taken."""

    @field_validator("rows", mode="before")
    @classmethod
    def _named_by_text(cls, rows: object) -> object:
        return {str(name): row for name, row in rows.items()} if isinstance(rows, dict) else rows

    @field_validator("final", mode="before")
    @classmethod
    def _final_by_text(cls, name: object) -> object:
        return str(name) if isinstance(name, int) else name

    @model_validator(mode="after")
    def _stands_on_its_rows(self) -> Self:
        seen: list[str] = []
        for name, row in self.rows.items():
            if (row.over is None) != (not seen):
                raise ValueError(f"rows.{name}: only the first row, the base, stands over none; name a row in over")
            if row.over is not None and row.over not in seen:
                raise ValueError(f"rows.{name}: over {row.over!r} is no row above it; use {', '.join(seen)}")
            if (not row.changes) != (not seen):
                raise ValueError(f"rows.{name}: the base changes nothing, every other row something; correct changes")
            seen.append(name)
        if self.final not in seen[1:]:
            raise ValueError(f"final {self.final!r} is no row above the base; use {', '.join(seen[1:])}")
        return self

    @property
    def base(self) -> str:
        """The first row's name."""
        return next(iter(self.rows))

    @property
    def choices(self) -> tuple[str, ...]:
        """The rows from the base (not included) to the final one, each over the one before."""
        way = [self.final]
        while (over := self.rows[way[-1]].over) is not None:
            way.append(over)
        return tuple(reversed(way[:-1]))


@dataclass(frozen=True)
class AblationRow:
    """A row with its architecture.

    Attributes:
        name: of the ladder's row, ``6 without 3``, ``0 with 3``.
        over: the name of the row it is compared with; None for the base.
        choice: the row whose changes make the difference; None for the base.
        changes: all that tells it from the base.
    """

    name: str
    title: str
    group: Group
    over: str | None
    choice: str | None
    changes: Mapping[str, Any]
    architecture: Architecture
    published: Mapping[Quantity, PublishedNumber]


def plan(settings: AblationConfig, base: Architecture, *, source: str) -> list[AblationRow]:
    """Every row of an ablation on a base, in the order of the table; several may be one architecture.

    Raises:
        InputError: naming the row whose change is unknown, wrong, contradictory or without effect.
    """
    checked = {name: _checked(name, row, base, source) for name, row in settings.rows.items()}

    def planned(
        name: str, title: str, group: Group, over: str | None, choice: str | None, of: list[str]
    ) -> AblationRow:
        changes = _joined(checked[row] for row in of)
        place = f"ablation.rows.{name}" if group == "ladder" else f"ablation.{group}: {name}"
        arch = _built(base, changes, source=source, place=place)
        published = settings.rows[name].published if group == "ladder" else {}
        return AblationRow(name, title, group, over, choice, changes, arch, published)

    found = [
        planned(name, row.title, "ladder", row.over, name if row.over else None, _below(settings, name))
        for name, row in settings.rows.items()
    ]
    ladder = {row.name: row.architecture for row in found}
    for row in found[1:]:
        _check_effect(row, checked[row.name], ladder[str(row.over)], source)
    choices, final = settings.choices, settings.final
    if settings.without:
        for name in choices:
            rest = [other for other in choices if other != name]
            title = f"without: {settings.rows[name].title}"
            found.append(planned(f"{final} without {name}", title, "without", final, name, rest))
    if settings.alone:
        for name in choices:
            title = f"alone: {settings.rows[name].title}"
            found.append(planned(f"{settings.base} with {name}", title, "alone", settings.base, name, [name]))
    return found


def space_of(settings: AblationConfig, around: Space, *, source: str) -> Space:
    """The space whose points are the rows' architectures, each once: on the base and at the latent of ``around``."""
    from archsearch.spaces.knob import read_knob

    choices: dict[str, Mapping[str, Any]] = {}
    known: set[str] = set()
    for row in plan(settings, around.base, source=source):
        if row.architecture.id not in known:
            known.add(row.architecture.id)
            choices[row.name] = dict(row.changes)
    knob = read_knob("row", choices, len(around.base.down), source=source)
    references = {name: {"row": i} for i, name in enumerate(choices)}
    return dataclasses.replace(around, name=f"{around.name} rows", knobs=(knob,), limits={}, references=references)


def _below(settings: AblationConfig, name: str) -> list[str]:
    """The row and those it stands on, from the base up."""
    over = settings.rows[name].over
    return [*(_below(settings, over) if over else []), name]


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The changes of several rows; one made again stands where it was made last, as changes apply in order."""
    joined: dict[str, Any] = {}
    for part in parts:
        for path, value in part.items():
            joined.pop(path, None)
            joined[path] = value
    return joined


def _checked(name: str, row: AblationRowConfig, base: Architecture, source: str) -> dict[str, Any]:
    from archsearch.spaces.knob import read_changes

    return read_changes(row.changes, len(base.down), source=source, place=f"ablation.rows.{name}.changes")


def _built(base: Architecture, changes: Mapping[str, Any], *, source: str, place: str) -> Architecture:
    try:
        return overrides.apply_overrides(base, changes)
    except ValueError as error:
        raise InputError(source, *_told(error), place=place) from None


def _told(error: ValueError) -> tuple[str, str]:
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        text = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
    problem, _, remedy = text.partition("; ")
    return problem, remedy or "correct the row's changes"


def _check_effect(row: AblationRow, own: Mapping[str, Any], over: Architecture, source: str) -> None:
    """A change of what the row's net does not have contradicts the row: an expansion where no conv is separable."""
    place = f"ablation.rows.{row.name}.changes"
    for path in own:
        fields = [field for field in overrides.resolve_path(path, len(over.down)) if "layers" not in field]
        if fields and all(_at(row.architecture, field) != _at(row.architecture.canonical(), field) for field in fields):
            problem, remedy = "changes nothing in this row's net", "remove it, or change what it depends on"
            raise InputError(source, problem, remedy, place=f"{place}.{path}")
    if row.architecture.id == over.id:
        raise InputError(source, f"build the same net as row {row.over}", "correct them or remove the row", place=place)


def _at(arch: Architecture, field: Iterable[str | int]) -> object:
    value: Any = arch
    for step in field:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value
