"""Charts of a study as plotly figures; colors are CSS variables that the page's script resolves for each theme."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from archsearch.reports.rendering import formatting
from archsearch.reports.rendering.plotting import Figure, base_layout, front_line, markers, scatter
from archsearch.reports.study.data import StudyData, diverged, title
from archsearch.score import QUALITY_METRICS
from archsearch.stats.estimate import Estimate
from archsearch.stats.pareto import front, hypervolume_history
from archsearch.studies.storage.record import Candidate

STRIP_BOTTOM = 0.93
"""Lower edge of the strip of infeasible candidates, as a fraction of the height of the front's chart."""


def chart_axes(study: StudyData) -> tuple[list[str], list[str]]:
    """Choices for the vertical and the horizontal axis of the front; objectives of the study come first."""
    objectives = study.objectives
    quality = [n for n in study.measures if n in QUALITY_METRICS]
    cost = [n for n in study.measures if n not in QUALITY_METRICS]
    if not set(objectives) & set(quality):
        return [objectives[0], *quality], [n for n in cost if n != objectives[0]]
    if len(objectives) > 1 and not set(objectives) & set(cost):
        return quality, [*objectives[1:], *cost]
    return quality, cost


def front_chart(study: StudyData, y: str, x: str) -> Figure:
    """Scatter chart of all candidates with their intervals and the Pareto front of the two axes; smaller is better."""
    plotted, strip = _split_by_values(study, y, x)
    scored = [c for c in plotted if c in study.scored]
    groups = [
        _markers(study, [c for c in plotted if c not in scored], y, x, "infeasible"),
        *(
            _markers(
                study, [c for c in scored if _role(c) == role and (c.number in study.front) == on_front], y, x, role
            )
            for role in ("searched", "reference", "base")
            for on_front in (False, True)
        ),
    ]
    pairs = [(a.value, b.value) for c in scored if (a := study.value_of(c, x)) and (b := study.value_of(c, y))]
    staircase = {"name": "front", **front_line(front(pairs), "var(--front)", opacity=0.6)}
    data = [staircase, *(g for g in groups if g["x"]), _ring(study, y, x), _strip(study, strip, x)]
    ticks = formatting.ticks(i.value for c in (*scored, *strip) if (i := study.value_of(c, x)))
    layout = base_layout(study.axis(x), study.axis(y))
    if ticks:
        layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout["yaxis"]["domain"] = [0, STRIP_BOTTOM - 0.03] if strip else [0, 1]
    layout["yaxis2"] = {"domain": [STRIP_BOTTOM, 1], "range": [-1, 1], "visible": False, "fixedrange": True}
    layout["shapes"], layout["annotations"] = _constraint(study, x, log=bool(ticks))
    layout["annotations"] += _names(study, y, x, log=bool(ticks))
    if strip:
        layout["annotations"].append(_note("not trained: infeasible", x=0, y=1))
    return {"data": data, "layout": layout}


def _split_by_values(study: StudyData, y: str, x: str) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates that have both numbers, and those that have only the horizontal one."""
    finished = [c for c in study.distinct if c.state in ("scored", "infeasible") and not diverged(c)]
    plotted = [c for c in finished if study.value_of(c, x) and study.value_of(c, y)]
    strip = [c for c in finished if study.value_of(c, x) and not study.value_of(c, y)]
    return plotted, strip


def _role(candidate: Candidate) -> str:
    return {None: "searched", "base": "base"}.get(candidate.name, "reference")


_SHAPES = {"searched": ("circle", 9), "reference": ("diamond", 13), "base": ("square", 11), "infeasible": ("circle", 9)}


def _markers(study: StudyData, group: Sequence[Candidate], y: str, x: str, role: str) -> Figure:
    shape, size = _SHAPES[role]
    color = "var(--front)" if group and group[0].number in study.front else "var(--dominated)"
    xs, ys = ([value for c in group if (value := study.value_of(c, name))] for name in (x, y))
    return markers(xs, ys, color) | {
        "name": role,
        "customdata": [c.number for c in group],
        "marker": {
            "symbol": f"{shape}-open" if role == "infeasible" else shape,
            "size": size,
            "color": color,
            "line": {"width": 1.5, "color": "var(--dominated)" if role == "infeasible" else "var(--surface)"},
        },
    }


def _ring(study: StudyData, y: str, x: str) -> Figure:
    """Ring around the recommended candidate; the page's script draws another one around the selected candidate."""
    best_x, best_y = study.value_of(study.best, x), study.value_of(study.best, y)
    points = [(best_x.value, best_y.value)] if best_x and best_y else []
    marker = {"symbol": "circle-open", "size": 22, "color": "var(--knee)", "line": {"width": 2.5}}
    return scatter(points, name="recommended", marker=marker, hoverinfo="skip")


def _strip(study: StudyData, group: Sequence[Candidate], x: str) -> Figure:
    points = [(i.value, -0.4) for c in group if (i := study.value_of(c, x))]
    marker = {"symbol": "circle-open", "size": 8, "color": "var(--dominated)", "line": {"width": 1.5}}
    numbers = [c.number for c in group]
    return scatter(points, name="infeasible", yaxis="y2", customdata=numbers, marker=marker, hoverinfo="text")


def _constraint(study: StudyData, x: str, *, log: bool) -> tuple[list[Figure], list[Figure]]:
    """Constraint of the study on the horizontal axis, as a line and its label."""
    upper = study.attrs["settings"].get("constraints", {}).get(x)
    if upper is None:
        return [], []
    at = upper / 1e6 if formatting.unit(x).startswith("M") else upper
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    shape = {"type": "line", "x0": at, "x1": at, "xref": "x", "y0": 0, "y1": 1, "yref": "paper", "line": line}
    # On a logarithmic axis plotly places annotations by exponent, unlike traces and shapes.
    note = _note(f"limit {at:g} {formatting.unit(x)}", x=math.log10(at) if log else at, y=0)
    return [shape], [note | {"xref": "x", "xshift": 4, "yanchor": "bottom"}]


def _names(study: StudyData, y: str, x: str, *, log: bool) -> list[Figure]:
    """Labels of the base and the reference designs, next to their points."""
    named = [(c, study.value_of(c, x), study.value_of(c, y)) for c in study.scored if c.name and not diverged(c)]
    points = sorted(((a.value, b.value, title(c)) for c, a, b in named if a and b), key=lambda point: point[0])
    notes = []
    for i, (x_value, y_value, name) in enumerate(points):
        # From the left end leftwards, from the right end rightwards, and each further one higher: none hides another.
        is_left, rank = i < len(points) / 2, min(i, len(points) - 1 - i)
        anchor = {"xanchor": "right" if is_left else "left", "ax": -20 if is_left else 20, "ay": -26 - 18 * rank}
        notes.append(
            _note(html.escape(name), x=math.log10(x_value) if log else x_value, y=y_value)
            | {"xref": "x", "yref": "y", "showarrow": True, **anchor}
            | {"arrowwidth": 1, "arrowhead": 0, "arrowcolor": "var(--muted)", "standoff": 8}
        )
    return notes


def _note(text: str, *, x: float, y: float) -> Figure:
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left", "showarrow": False}
    return {"text": text, **place, "font": {"size": 12, "color": "var(--muted)"}}


def hypervolume_chart(study: StudyData) -> Figure:
    """Hypervolume after each scored candidate, in percent of the box between the best and the worst values."""
    scored = [c for c in study.scored if not diverged(c)]
    points = [tuple(i.value for n in study.objectives if (i := study.value_of(c, n))) for c in scored]
    dominated = hypervolume_history(points)
    sizes = [8 if i == 0 or share > dominated[i - 1] else 0 for i, share in enumerate(dominated)]
    data = scatter(
        [(i, 100 * share) for i, share in enumerate(dominated, start=1)],
        "lines+markers",
        customdata=[c.number for c in scored],
        line={"shape": "hv", "width": 2, "color": "var(--front)"},
        marker={"size": sizes, "color": "var(--front)"},
        hovertemplate="after %{x} scored: %{y:.1f} %<extra></extra>",
    )
    layout = base_layout("Candidates scored", "Hypervolume")
    layout["xaxis"]["range"] = [0.5, len(dominated) + 0.5]
    layout["yaxis"] |= {"ticksuffix": " %", "range": [0, 105]}
    return {"data": [data], "layout": layout}


def seeds_chart(study: StudyData, scored: Sequence[tuple[Candidate, Estimate]]) -> Figure:
    """Scatter chart of one metric for the first two seeds of every candidate, and the diagonal of perfect agreement."""
    pairs = [(c, e.by_seed[:2]) for c, e in scored if len(e.by_seed) > 1]
    ends = [f(value for _, pair in pairs for value in pair) for f in (min, max)]
    dotted = {"width": 1, "dash": "dot", "color": "var(--muted)"}
    line = scatter([(end, end) for end in ends], "lines", line=dotted, hoverinfo="skip")
    marker = {"size": 8, "color": "var(--front)", "line": {"width": 1, "color": "var(--surface)"}}
    numbers = [c.number for c, _ in pairs]
    dots = scatter([pair for _, pair in pairs], customdata=numbers, marker=marker, hoverinfo="text")
    seeds = study.seeds
    layout = base_layout(f"seed {seeds[0]}", f"seed {seeds[1]}")
    return {"data": [line, dots], "layout": layout}
