"""The charts, as plotly figures. Colours are the page's CSS variables, which its script resolves for light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from archsearch.reports.rendering import formatting
from archsearch.reports.rendering.plotting import Figure, base_layout, front_line
from archsearch.reports.study.data import StudyData, diverged, title
from archsearch.score import QUALITY_METRICS
from archsearch.stats.estimate import Estimate
from archsearch.stats.main_effects import EffectInterval
from archsearch.stats.pareto import front, shares
from archsearch.studies.search.candidates import Candidate

STRIP = 0.93
"""Where on the height of the front's chart the strip of the infeasible begins."""


def chart_axes(facts: StudyData) -> tuple[list[str], list[str]]:
    """The numbers that may stand on the front's vertical and horizontal axis; the study's own come first."""
    named = facts.objectives
    quality = [n for n in facts.measures if n in QUALITY_METRICS]
    cost = [n for n in facts.measures if n not in QUALITY_METRICS]
    if not set(named) & set(quality):
        return [named[0], *quality], [n for n in cost if n != named[0]]
    if len(named) > 1 and not set(named) & set(cost):
        return quality, [*named[1:], *cost]
    return quality, cost


def front_chart(facts: StudyData, y: str, x: str) -> Figure:
    """Every candidate on two axes, both better towards the origin, with intervals, and the front of the two."""
    inside, strip = _placed(facts, y, x)
    scored = [c for c in inside if c in facts.scored]
    groups = [
        _markers(facts, [c for c in inside if c not in scored], y, x, "outside"),
        *(
            _markers(facts, [c for c in scored if _role(c) == role and (c.number in facts.front) == best], y, x, role)
            for role in ("searched", "reference", "base")
            for best in (False, True)
        ),
    ]
    data = [_staircase(facts, scored, y, x), *(g for g in groups if g["x"])]
    data += [_ring(facts, y, x), _strip(facts, strip, x)]
    ticks = formatting.ticks(i.value for c in (*scored, *strip) if (i := facts.amount(c, x)))
    layout = base_layout(formatting.axis(x, facts.extractor), formatting.axis(y, facts.extractor))
    if ticks:
        layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout["yaxis"]["domain"] = [0, STRIP - 0.03] if strip else [0, 1]
    layout["yaxis2"] = {"domain": [STRIP, 1], "range": [-1, 1], "visible": False, "fixedrange": True}
    layout["shapes"], layout["annotations"] = _limit(facts, x, log=bool(ticks))
    layout["annotations"] += _names(facts, y, x, log=bool(ticks))
    if strip:
        layout["annotations"].append(_note("not trained: outside the limits", x=0, y=1))
    return {"data": data, "layout": layout}


def _placed(facts: StudyData, y: str, x: str) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates that have both numbers, and those that have the horizontal one alone."""
    finished = [c for c in facts.distinct if c.state in ("scored", "infeasible") and not diverged(c)]
    inside = [c for c in finished if facts.amount(c, x) and facts.amount(c, y)]
    strip = [c for c in finished if facts.amount(c, x) and not facts.amount(c, y)]
    return inside, strip


def _role(candidate: Candidate) -> str:
    return {None: "searched", "base": "base"}.get(candidate.name, "reference")


_SHAPES = {"searched": ("circle", 9), "reference": ("diamond", 13), "base": ("square", 11), "outside": ("circle", 9)}


def _markers(facts: StudyData, group: Sequence[Candidate], y: str, x: str, role: str) -> Figure:
    shape, size = _SHAPES[role]
    colour = "var(--front)" if group and group[0].number in facts.front else "var(--dominated)"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": role,
        "x": [i.value for c in group if (i := facts.amount(c, x))],
        "y": [i.value for c in group if (i := facts.amount(c, y))],
        "customdata": [c.number for c in group],
        "error_x": _bars([i for c in group if (i := facts.amount(c, x))], colour),
        "error_y": _bars([i for c in group if (i := facts.amount(c, y))], colour),
        "marker": {
            "symbol": f"{shape}-open" if role == "outside" else shape,
            "size": size,
            "color": colour,
            "line": {"width": 1.5, "color": "var(--dominated)" if role == "outside" else "var(--surface)"},
        },
        "hoverinfo": "text",
    }


def _bars(intervals: Sequence[EffectInterval], colour: str) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.value for i in intervals],
        "arrayminus": [i.value - i.low for i in intervals],
        "color": colour,
        "thickness": 1,
        "width": 0,
        "visible": any(i.high > i.low for i in intervals),
    }


def _staircase(facts: StudyData, scored: Sequence[Candidate], y: str, x: str) -> Figure:
    pairs = [(a.value, b.value) for c in scored if (a := facts.amount(c, x)) and (b := facts.amount(c, y))]
    return {"name": "front", **front_line(front(pairs), "var(--front)", opacity=0.6)}


def _ring(facts: StudyData, y: str, x: str) -> Figure:
    """Around the recommended candidate; the page moves a second one to whichever is selected."""
    at, up = facts.amount(facts.best, x), facts.amount(facts.best, y)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "recommended",
        "x": [at.value] if at else [],
        "y": [up.value] if up else [],
        "marker": {"symbol": "circle-open", "size": 22, "color": "var(--knee)", "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _strip(facts: StudyData, group: Sequence[Candidate], x: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "infeasible",
        "x": [i.value for c in group if (i := facts.amount(c, x))],
        "y": [-0.4 for _ in group],
        "yaxis": "y2",
        "customdata": [c.number for c in group],
        "marker": {"symbol": "circle-open", "size": 8, "color": "var(--dominated)", "line": {"width": 1.5}},
        "hoverinfo": "text",
    }


def _limit(facts: StudyData, x: str, *, log: bool) -> tuple[list[Figure], list[Figure]]:
    """The study's limit on the horizontal axis, as a line and its name."""
    most = facts.attrs["settings"].get("limits", {}).get(x)
    if most is None:
        return [], []
    at = most / 1e6 if formatting.unit(x).startswith("M") else most
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    shape = {"type": "line", "x0": at, "x1": at, "xref": "x", "y0": 0, "y1": 1, "yref": "paper", "line": line}
    # Unlike traces and shapes, annotations take exponents on a logarithmic axis.
    note = _note(f"limit {at:g} {formatting.unit(x)}", x=math.log10(at) if log else at, y=0)
    return [shape], [note | {"xref": "x", "xshift": 4, "yanchor": "bottom"}]


def _names(facts: StudyData, y: str, x: str, *, log: bool) -> list[Figure]:
    """The name of every base and reference design beside its point."""
    notes = []
    for i, c in enumerate(c for c in facts.scored if c.name and not diverged(c)):
        at, up = facts.amount(c, x), facts.amount(c, y)
        if at and up:
            place = math.log10(at.value) if log else at.value
            side = 1 if i % 2 else -1
            notes.append(
                _note(html.escape(title(c)), x=place, y=up.value)
                | {"xref": "x", "yref": "y", "xanchor": "center", "showarrow": True, "ax": 34 * side, "ay": -26}
                | {"arrowwidth": 1, "arrowhead": 0, "arrowcolor": "var(--muted)", "standoff": 8}
            )
    return notes


def _note(text: str, *, x: float, y: float) -> Figure:
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "showarrow": False,
        "font": {"size": 12, "color": "var(--muted)"},
    }


def hypervolume_chart(facts: StudyData) -> Figure:
    """The dominated share of the objectives' box after each scored candidate."""
    scored = [c for c in facts.scored if not diverged(c)]
    points = [tuple(i.value for n in facts.objectives if (i := facts.amount(c, n))) for c in scored]
    found = shares(points)
    data = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(range(1, len(found) + 1)),
        "y": [100 * share for share in found],
        "customdata": [c.number for c in scored],
        "line": {"shape": "hv", "width": 2, "color": "var(--front)"},
        "marker": {
            "size": [8 if i == 0 or share > found[i - 1] else 0 for i, share in enumerate(found)],
            "color": "var(--front)",
        },
        "hovertemplate": "after %{x} scored: %{y:.1f} %<extra></extra>",
    }
    layout = base_layout("Candidates scored", "Dominated share")
    layout["xaxis"]["range"] = [0.5, len(found) + 0.5]
    layout["yaxis"] |= {"ticksuffix": " %", "range": [0, 105]}
    return {"data": [data], "layout": layout}


def seeds_chart(facts: StudyData, scored: Sequence[tuple[Candidate, Estimate]]) -> Figure:
    """One metric of every candidate by the first two seeds, and the line on which they would agree."""
    both = [(c, e.by_seed[:2]) for c, e in scored if len(e.by_seed) > 1]
    ends = [f(value for _, pair in both for value in pair) for f in (min, max)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": ends,
        "line": {"width": 1, "dash": "dot", "color": "var(--muted)"},
        "hoverinfo": "skip",
    }
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": [pair[0] for _, pair in both],
        "y": [pair[1] for _, pair in both],
        "customdata": [c.number for c, _ in both],
        "marker": {"size": 8, "color": "var(--front)", "line": {"width": 1, "color": "var(--surface)"}},
        "hoverinfo": "text",
    }
    seeds = facts.seeds
    layout = base_layout(f"seed {seeds[0]}", f"seed {seeds[1]}")
    return {"data": [line, dots], "layout": layout}
