"""The ablation's page: its table and the ladder as a path in the plane of quality and latency."""

from __future__ import annotations

from typing import Any

from archsearch.reports.ablation import reproduction, table
from archsearch.reports.rendering import formatting, html, plotting
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study import page
from archsearch.studies.experiments.ablation_results import Ablation, RowResult

ARROWS = {"better": "var(--better)", "worse": "var(--worse)"}


def render(ablation: Ablation) -> str:
    """The page as HTML, one file that needs no network."""
    axes = chart_axes(ablation)
    header, sums = table.sum_lines(ablation)
    groups = [(title, table.header(ablation, g), table.lines(ablation, g)) for g, title in table.GROUPS.items()]
    told = reproduction.sentences(ablation)
    return html.render_page(
        "ablation.html",
        name=ablation.name,
        headline=told[0] if told else "",
        sentences=told[1:],
        groups=[group for group in groups if group[-1]],
        sum_header=header,
        sums=sums,
        sources=reproduction.sources(ablation),
        charts=[(f"ladder-{y}", formatting.label(y, ablation.extractor)) for y in axes],
        protocol=page.flat(page.unnested(ablation.attrs.get("protocol", {}))) if ablation.metrics else [],
        machine=page.flat(ablation.attrs.get("machine", {})),
        data={"charts": {f"ladder-{y}": ladder_chart(ablation, y) for y in axes}},
    )


def chart_axes(ablation: Ablation) -> list[str]:
    """What is drawn against latency: quality where it was taken, else size and compute; nothing without latencies."""
    timed = [r for r in ablation.results if r.planned.group == "ladder" and r.score and r.score.latency]
    if len(timed) < 2:
        return []
    return list(ablation.metrics) or ["params", "macs"]


def ladder_chart(ablation: Ablation, y: str) -> Figure:
    """The ladder against latency: a point a row with its interval and quartiles, an arrow from the row it changes."""
    points = {r.planned.name: at for r in ablation.results if r.planned.group == "ladder" and (at := _at(r, y))}
    layout = plotting.base_layout(formatting.axis("latency_ms", ""), formatting.axis(y, ablation.extractor))
    arrows = [_arrow(r, points, y) for r in ablation.results if r.planned.name in points and r.planned.over in points]
    layout["annotations"] = [*arrows, *(_name(name, at) for name, at in points.items())]
    x, values = ([at[i] for at in points.values()] for i in (0, 1))
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [i.value for i in x],
        "y": [i.value for i in values],
        "error_x": _whiskers(x),
        "error_y": _whiskers(values),
        "hovertext": [f"{name}: {ablation.result(name).planned.title}" for name in points],
        "hoverinfo": "text",
        "marker": {"size": 8, "color": "var(--front)"},
    }
    return {"data": [trace], "layout": layout}


def _at(r: RowResult, y: str) -> tuple[Any, Any] | None:
    if r.score is None:
        return None
    x, value = formatting.value_of(r.score, "latency_ms"), formatting.value_of(r.score, y)
    pooled = r.quality.get(y)
    if value and pooled:
        value = type(value)(pooled.value, pooled.low, pooled.high)
    return (x, value) if x and value else None


def _whiskers(intervals: list[Any]) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.value for i in intervals],
        "arrayminus": [i.value - i.low for i in intervals],
        "color": "var(--dominated)",
        "thickness": 1,
        "width": 0,
    }


def _arrow(r: RowResult, points: dict[str, Any], y: str) -> Figure:
    (x0, y0), (x1, y1) = points[str(r.planned.over)], points[r.planned.name]
    effect = r.effects.get(y)
    return {
        "x": x1.value,
        "y": y1.value,
        "ax": x0.value,
        "ay": y0.value,
        **{"xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "", "showarrow": True},
        **{"arrowhead": 3, "arrowsize": 1.1, "arrowwidth": 1.6, "standoff": 6, "startstandoff": 6},
        "arrowcolor": ARROWS.get(effect.verdict if effect else "", "var(--dominated)"),
    }


def _name(name: str, at: tuple[Any, Any]) -> Figure:
    where = {"x": at[0].value, "y": at[1].value, "xanchor": "left", "yanchor": "bottom", "xshift": 5, "yshift": 3}
    return {**where, "text": name, "showarrow": False, "font": {"size": 13, "color": "var(--ink)"}}
