"""Rows of an ablation: a ladder of changes from a base, the final design without each choice, and each choice alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from archsearch.spaces.knob import read_changes, read_knob
from archsearch.spaces.space import Space
from snapgen.architecture import overrides
from snapgen.architecture.schema import Architecture
from snapgen.config import Config, problem_and_remedy, rule
from snapgen.errors import InputError

Group = Literal["ladder", "leave_one_out", "one_at_a_time"]

Quantity = Literal["params", "macs", "latency_ms", "frechet_distance"]
"""Quantities for which a paper may have published a number."""


class PublishedNumber(Config):
    """A published number of a row, as the paper states it; never a measurement of ours."""

    value: float | None = None
    """Change against the row's baseline in percent (params, macs, latency_ms), or the FID itself (frechet_distance)."""
    quote: str = ""
    """The paper's own wording, where it gives no number or gives one in another form."""

    @rule
    def _is_not_empty(self) -> None:
        if self.value is None and not self.quote:
            raise ValueError("has neither value nor quote; give one or remove it")


class AblationRowConfig(Config):
    """One row of the ablation's YAML."""

    title: str
    """Description of the row's change, as shown in the table."""
    baseline: str | None = None
    """Name of the row above that this one changes; None for the base, which is the first row."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Paths into the architecture and the values to set there; paths are those of a space's knobs."""
    published: dict[Quantity, PublishedNumber] = Field(default_factory=dict)
    """Published numbers of this row, by quantity: params, macs, latency_ms, frechet_distance."""


class AblationConfig(Config):
    """An ablation: the ladder of rows, and the rows that are derived from it."""

    rows: dict[str, AblationRowConfig] = Field(min_length=2)
    """Rows by name, in the order of the ladder; the first is the base."""
    final_row: str
    """The final design. Its *choices* are the rows from the base up to it; leave_one_out and one_at_a_time use them."""
    leave_one_out: bool = True
    """Also score the final row with each of its choices reverted."""
    one_at_a_time: bool = False
    """Also score the base with each choice alone, so that single effects can be added up against the joint effect."""
    latency_repeats: int = Field(default=0, ge=0, le=1_000)
    """Largest number of further latency measurements a row. All rows are measured in turn until each one's two lowest
    agree; nets of a millisecond are easily disturbed by other processes. 0: the single measurement of the score."""
    published_from: str | None = None
    """Another ablation, by name or file, whose published numbers are shown beside rows of the same name."""
    published_source: str = ""
    """Source of the published numbers."""
    published_protocol: str = ""
    """Measurement protocol of the published numbers."""

    @field_validator("rows", mode="before")
    @classmethod
    def _row_names_are_strings(cls, rows: object) -> object:
        return {str(name): row for name, row in rows.items()} if isinstance(rows, dict) else rows

    @field_validator("final_row", mode="before", json_schema_input_type=str | int)
    @classmethod
    def _final_row_is_a_string(cls, name: object) -> object:
        return str(name) if isinstance(name, int) else name

    @rule
    def _rows_build_on_earlier_ones(self) -> None:
        seen: list[str] = []
        for name, row in self.rows.items():
            if (row.baseline is None) != (not seen):
                raise ValueError(
                    f"rows.{name}: the first row, the base, has no baseline, every other row has one; correct baseline"
                )
            if row.baseline is not None and row.baseline not in seen:
                raise ValueError(f"rows.{name}: baseline {row.baseline!r} is not an earlier row; use {', '.join(seen)}")
            if (not row.overrides) != (not seen):
                raise ValueError(
                    f"rows.{name}: the base has no overrides and every other row has some; correct overrides"
                )
            seen.append(name)

    @rule
    def _has_its_final_row(self) -> None:
        after = list(self.rows)[1:]
        if self.final_row not in after:
            raise ValueError(f"final_row {self.final_row!r} is not a row after the base; use {', '.join(after)}")

    @property
    def base(self) -> str:
        """Name of the first row."""
        return next(iter(self.rows))

    def path(self, name: str) -> tuple[str, ...]:
        """Names of the rows from the base to a row, each the baseline of the next."""
        baseline = self.rows[name].baseline
        return (*(() if baseline is None else self.path(baseline)), name)

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the rows from the base (excluded) to the final row."""
        return self.path(self.final_row)[1:]


@dataclass(frozen=True)
class AblationRow:
    """A row with its architecture.

    Attributes:
        name: name of the ladder's row, or e.g. ``6 without 3``, ``0 with 3``.
        baseline: name of the row it is compared with; None for the base.
        choice: name of the row whose changes make the difference; None for the base.
        changes: all overrides that separate it from the base.
    """

    name: str
    title: str
    group: Group
    baseline: str | None
    choice: str | None
    changes: Mapping[str, Any]
    architecture: Architecture
    published: Mapping[Quantity, PublishedNumber]


def expand_rows(settings: AblationConfig, base: Architecture, *, source: str) -> list[AblationRow]:
    """Expand an ablation into its rows, in the order of the table; several rows may share one architecture.

    Raises:
        InputError: if a row's override is unknown, invalid, contradictory or without effect; it names the row.
    """
    checked = {
        name: read_changes(row.overrides, len(base.down), source=source, place=f"ablation.rows.{name}.overrides")
        for name, row in settings.rows.items()
    }

    def build(
        name: str, title: str, group: Group, baseline: str | None, choice: str | None, applied: Sequence[str]
    ) -> AblationRow:
        changes: dict[str, Any] = {}
        for path, value in (change for row in applied for change in checked[row].items()):
            changes.pop(path, None)  # a repeated path moves to its last position, since order matters
            changes[path] = value
        place = f"ablation.rows.{name}" if group == "ladder" else f"ablation.{group}: {name}"
        try:
            arch = overrides.apply_overrides(base, changes)
        except ValueError as error:
            raise InputError(source, *problem_and_remedy(error, "correct the row's overrides"), place=place) from None
        published = settings.rows[name].published if group == "ladder" else {}
        return AblationRow(name, title, group, baseline, choice, changes, arch, published)

    rows = [
        build(name, row.title, "ladder", row.baseline, name if row.baseline else None, settings.path(name))
        for name, row in settings.rows.items()
    ]
    ladder = {row.name: row.architecture for row in rows}
    for row in rows[1:]:
        _check_effect(row, checked[row.name], ladder[str(row.baseline)], source)
    choices, final = settings.choices, settings.final_row
    if settings.leave_one_out:
        for name in choices:
            rest = [choice for choice in choices if choice != name]
            title = f"without: {settings.rows[name].title}"
            rows.append(build(f"{final} without {name}", title, "leave_one_out", final, name, rest))
    if settings.one_at_a_time:
        for name in choices:
            title = f"alone: {settings.rows[name].title}"
            rows.append(build(f"{settings.base} with {name}", title, "one_at_a_time", settings.base, name, [name]))
    return rows


def space_of_rows(settings: AblationConfig, around: Space, *, source: str) -> Space:
    """A space whose points are the distinct architectures of the rows, with the base and latent size of ``around``."""
    choices: dict[str, Mapping[str, Any]] = {}
    seen: set[str] = set()
    for row in expand_rows(settings, around.base, source=source):
        if row.architecture.id not in seen:
            seen.add(row.architecture.id)
            choices[row.name] = dict(row.changes)
    knob = read_knob("row", choices, len(around.base.down), source=source)
    references = {name: {"row": i} for i, name in enumerate(choices)}
    return dataclasses.replace(around, name=f"{around.name} rows", knobs=(knob,), constraints={}, references=references)


def _check_effect(row: AblationRow, own: Mapping[str, Any], baseline: Architecture, source: str) -> None:
    """Raise if an override has no effect on the row's net, such as an expansion where no convolution is separable."""
    place = f"ablation.rows.{row.name}.overrides"
    for path in own:
        fields = [field for field in overrides.resolve_path(path, len(baseline.down)) if "layers" not in field]
        if fields and all(_at(row.architecture, field) != _at(row.architecture.canonical(), field) for field in fields):
            problem, remedy = "has no effect on this row's net", "remove it, or change what it depends on"
            raise InputError(source, problem, remedy, place=f"{place}.{path}")
    if row.architecture.id == baseline.id:
        raise InputError(
            source, f"build the same net as row {row.baseline}", "correct them or remove the row", place=place
        )


def _at(arch: Architecture, field: Iterable[str | int]) -> object:
    value: Any = arch
    for step in field:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    return value
