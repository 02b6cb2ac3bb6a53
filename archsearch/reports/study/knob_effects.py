"""What each knob does, laid out as a table: a row for every change, a column for every number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from archsearch.reports.rendering import formatting
from archsearch.reports.study.data import StudyData
from archsearch.score import QUALITY_METRICS
from archsearch.stats.main_effects import FEWEST, Effect, EffectInterval, Effects, Knob, effects

ROOM = 1.3
"""Width of a column's scale over its largest effect; an interval that reaches beyond is cut at the edge."""


@dataclass(frozen=True)
class Cell:
    """One interval, drawn and written. ``start``, ``dot`` and ``end`` are percent of the cell's width."""

    text: str
    verdict: str
    """``better``, ``worse``, ``cannot tell``; for a share always empty."""
    start: float
    dot: float
    end: float


@dataclass(frozen=True)
class Row:
    """A knob, or one of its changes; a cell is None where the knob was never varied."""

    name: str
    cells: tuple[Cell | None, ...]


Group = tuple[Row, tuple[Row, ...]]
"""A knob with its shares, and its changes with their effects."""


@dataclass(frozen=True)
class Column:
    """One number, and how far its effects are to be trusted."""

    label: str
    note: str


@dataclass(frozen=True)
class KnobTable:
    """Every knob, the most important first: its share of the variance, then its changes."""

    columns: tuple[Column, ...]
    knobs: tuple[Group, ...]
    """Those of which an effect can be told."""
    silent: tuple[Group, ...]
    """The others."""
    constant: tuple[str, ...]


def knob_table(facts: StudyData, names: Sequence[str]) -> KnobTable:
    """The effects on some of the score's numbers."""
    found = [_effects(facts, name) for name in names]
    columns = tuple(_column(facts, name, e) for name, e in zip(names, found, strict=True))
    every = {knob.name for e in found if e for knob in e.knobs}
    by_name = [{knob.name: knob for knob in e.knobs} if e else {} for e in found]
    order = sorted(every, key=lambda name: -max(k[name].share.value for k in by_name if name in k))
    scales = [_scale(e) for e in found]
    groups: list[Group] = []
    for name in order:
        shares = tuple(_share(knobs_of.get(name)) for knobs_of in by_name)
        changes = dict.fromkeys(e.change for k in by_name if name in k for e in k[name].effects)
        rows = (
            Row(
                change,
                tuple(_change(k.get(name), change, e, s) for k, e, s in zip(by_name, found, scales, strict=True)),
            )
            for change in changes
        )
        groups.append((Row(name, shares), tuple(rows)))
    constant = tuple(f.name for f in facts.factors if f.name not in every) if every else ()
    told = tuple(g for g in groups if _tells(g))
    return KnobTable(columns, told, tuple(g for g in groups if not _tells(g)), constant)


def _tells(group: Group) -> bool:
    return any(cell and cell.verdict in ("better", "worse") for row in group[1] for cell in row.cells)


def _effects(facts: StudyData, name: str) -> Effects | None:
    pool = facts.trained if name in QUALITY_METRICS else facts.distinct
    taken = [(c, i) for c in pool if (i := facts.amount(c, name)) and len(c.point) == len(facts.factors)]
    values = [i.value for _, i in taken]
    relative = name in formatting.COSTS and all(v > 0 for v in values)
    return effects([c.point for c, _ in taken], values, facts.factors, relative=relative)


def _column(facts: StudyData, name: str, found: Effects | None) -> Column:
    label = facts.label(name)
    if found is None:
        return Column(label, f"cannot tell from fewer than {FEWEST} different candidates")
    explained = formatting.percent(found.explained) if found.explained > 0 else "none"
    return Column(label, f"n = {found.n}; the knobs explain {explained} of the variance (leave-one-out)")


def _scale(found: Effects | None) -> float:
    sizes = [abs(e.size.value) for knob in found.knobs for e in knob.effects] if found else []
    return ROOM * max(sizes, default=1.0) or 1.0


def _share(knob: Knob | None) -> Cell | None:
    if knob is None:
        return None
    share = knob.share
    text = f"{formatting.percent(share.value)} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
    return Cell(text, "", 100 * share.low, 100 * share.value, 100 * share.high)


def _change(knob: Knob | None, change: str, found: Effects | None, scale: float) -> Cell | None:
    effect = next((e for e in knob.effects if e.change == change), None) if knob else None
    if effect is None or found is None:
        return None
    start, dot, end = (_place(value, scale) for value in _ends(effect))
    return Cell(formatting.format_change(effect.size, relative=found.relative), _verdict(effect.size), start, dot, end)


def _ends(effect: Effect) -> tuple[float, float, float]:
    return effect.size.low, effect.size.value, effect.size.high


def _place(value: float, scale: float) -> float:
    return round(min(max(50 + 50 * value / scale, 0), 100), 2)


def _verdict(size: EffectInterval) -> str:
    if not size.tells:
        return "cannot tell"
    return "worse" if size.value > 0 else "better"
