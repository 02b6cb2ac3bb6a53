"""Table of the effects of every knob: one row per change, one column per number of the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from archsearch.reports.rendering import formatting
from archsearch.reports.study.data import StudyData
from archsearch.reports.study.summary import count_candidates
from archsearch.score import QUALITY_METRICS
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import verdict
from archsearch.stats.main_effects import MIN_CANDIDATES, Effects, Knob, effects

SCALE_MARGIN = 1.3
"""Half-width of a column's scale over its largest effect; intervals that reach beyond are clipped at the edge."""


@dataclass(frozen=True)
class Cell:
    """One interval, as text and as a drawing; ``start``, ``dot`` and ``end`` are in percent of the cell's width."""

    text: str
    verdict: str
    """``better``, ``worse`` or ``cannot tell`` for an effect, ``no effect`` or ``either way`` for a counted one; empty
    for a share of the variance."""
    start: float
    dot: float
    end: float


@dataclass(frozen=True)
class KnobRow:
    """A knob or one of its changes, with one cell per column; a cell is None if the knob was never varied."""

    name: str
    cells: tuple[Cell | None, ...]


KnobGroup = tuple[KnobRow, tuple[KnobRow, ...]]
"""Row of a knob with its shares of the variance, and the rows of its changes with their effects."""


@dataclass(frozen=True)
class Column:
    """One number of the score, and a note on how much of its variance the effects explain."""

    label: str
    note: str


@dataclass(frozen=True)
class KnobTable:
    """Effects of all knobs, the most important knob first."""

    columns: tuple[Column, ...]
    significant: tuple[KnobGroup, ...]
    """Knobs with at least one effect whose interval excludes zero."""
    insignificant: tuple[KnobGroup, ...]
    """The other knobs."""
    constant: tuple[str, ...]
    """Names of the knobs that were never varied."""


def knob_table(study: StudyData, names: Sequence[str]) -> KnobTable:
    """The effects of all knobs on the given numbers of the score: counted where possible, else estimated."""
    counted = study.counted_neighbors
    fits = [counted.effects(n) if counted and n in counted.logarithms else _effects(study, n) for n in names]
    columns = tuple(_column(study, name, fit) for name, fit in zip(names, fits, strict=True))
    varied = {knob.name for fit in fits if fit for knob in fit.knobs}
    knobs_by_column = [{knob.name: knob for knob in fit.knobs} if fit else {} for fit in fits]
    # The most important knob first: by its largest share of the variance in any column.
    order = sorted(varied, key=lambda name: -max(knobs[name].share.value for knobs in knobs_by_column if name in knobs))
    scales = [_scale(fit) for fit in fits]
    groups: list[KnobGroup] = []
    for name in order:
        shares = tuple(_share(knobs.get(name)) for knobs in knobs_by_column)
        changes = dict.fromkeys(e.change for knobs in knobs_by_column if name in knobs for e in knobs[name].effects)
        rows = (
            KnobRow(
                change,
                tuple(
                    _change(knobs.get(name), change, fit, scale)
                    for knobs, fit, scale in zip(knobs_by_column, fits, scales, strict=True)
                ),
            )
            for change in changes
        )
        groups.append((KnobRow(name, shares), tuple(rows)))
    constant = tuple(f.name for f in study.factors if f.name not in varied) if varied else ()
    significant = tuple(g for g in groups if _is_significant(g))
    insignificant = tuple(g for g in groups if not _is_significant(g))
    return KnobTable(columns, significant, insignificant, constant)


def _is_significant(group: KnobGroup) -> bool:
    return any(cell and cell.verdict in ("better", "worse") for row in group[1] for cell in row.cells)


def _effects(study: StudyData, name: str) -> Effects | None:
    candidates = study.trained if name in QUALITY_METRICS else study.distinct
    values = [(c, v) for c in candidates if (v := study.value_of(c, name)) and len(c.point) == len(study.factors)]
    y = [value.value for _, value in values]
    relative = name in formatting.COSTS and all(v > 0 for v in y)
    return effects([c.point for c, _ in values], y, study.factors, relative=relative)


def _column(study: StudyData, name: str, fit: Effects | None) -> Column:
    label = study.label(name)
    if fit is None:
        return Column(label, f"needs at least {MIN_CANDIDATES} different candidates")
    if fit.counted:
        return Column(label, f"counted exactly, for the neighbors of {count_candidates(fit.n)}")
    explained = formatting.percent(fit.explained) if fit.explained > 0 else "none"
    note = f"n = {fit.n}; the knobs explain {explained} of the variance (leave-one-out)"
    return Column(formatting.with_interval(label, "95 % interval"), note)


def _scale(fit: Effects | None) -> float:
    sizes = [abs(e.size.value) for knob in fit.knobs for e in knob.effects] if fit else []
    return SCALE_MARGIN * max(sizes, default=1.0) or 1.0


def _share(knob: Knob | None) -> Cell | None:
    if knob is None:
        return None
    share = knob.share
    text = formatting.percent(share.value)
    if share.high > share.low:
        text += f" [{100 * share.low:.0f}, {100 * share.high:.0f}]"
    return Cell(text, "", 100 * share.low, 100 * share.value, 100 * share.high)


def _change(knob: Knob | None, change: str, fit: Effects | None, scale: float) -> Cell | None:
    effect = next((e for e in knob.effects if e.change == change), None) if knob else None
    if effect is None or fit is None:
        return None
    size = effect.size
    start, dot, end = (_position(value, scale) for value in (size.low, size.value, size.high))
    if fit.counted:
        return Cell(formatting.format_span(size), _counted_verdict(size), start, dot, end)
    return Cell(formatting.format_change(size, relative=fit.relative), verdict(size), start, dot, end)


def _counted_verdict(size: Estimate) -> str:
    if size.low == size.high == 0:
        return "no effect"
    return "better" if size.high <= 0 else "worse" if size.low >= 0 else "either way"


def _position(value: float, scale: float) -> float:
    """Horizontal position in percent of the cell's width; zero is in the middle."""
    return round(min(max(50 + 50 * value / scale, 0), 100), 2)
