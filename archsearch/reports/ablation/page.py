"""HTML page of an ablation: its tables, and charts of the ladder by quality and latency."""

from __future__ import annotations

from typing import Any

from archsearch.reports.ablation import reproduction, table
from archsearch.reports.rendering import formatting, html, plotting
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study import page
from archsearch.studies.experiments.ablation_results import Ablation, RowResult

ARROW_COLORS = {"better": "var(--better)", "worse": "var(--worse)"}


def render(ablation: Ablation) -> str:
    """Render the page as HTML: one file that needs no network."""
    axes = chart_axes(ablation)
    header, sums = table.sum_lines(ablation)
    groups = [(title, table.header(ablation, g), table.lines(ablation, g)) for g, title in table.GROUPS.items()]
    sentences = reproduction.sentences(ablation)
    return html.render_page(
        "ablation.html",
        name=ablation.name,
        headline=sentences[0] if sentences else "",
        sentences=sentences[1:],
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
    """Numbers to draw against latency: quality if measured, else params and MACs; empty without two latencies."""
    timed = [r for r in ablation.results if r.planned.group == "ladder" and r.score and r.score.latency]
    if len(timed) < 2:
        return []
    return list(ablation.metrics) or ["params", "macs"]


def ladder_chart(ablation: Ablation, y: str) -> Figure:
    """Chart of the ladder: one point per row with its interval and quartiles, and an arrow from its baseline row."""
    points = {
        r.planned.name: point for r in ablation.results if r.planned.group == "ladder" and (point := _point(r, y))
    }
    layout = plotting.base_layout(
        formatting.axis("latency_ms", "", records=ablation.latencies), formatting.axis(y, ablation.extractor)
    )
    arrows = [
        _arrow(r, points, y) for r in ablation.results if r.planned.name in points and r.planned.baseline in points
    ]
    layout["annotations"] = [*arrows, *(_label(name, point) for name, point in points.items())]
    x, values = ([point[i] for point in points.values()] for i in (0, 1))
    trace = plotting.markers(x, values) | {
        "hovertext": [f"{name}: {ablation.result(name).planned.title}" for name in points],
        "marker": {"size": 8, "color": "var(--front)"},
    }
    return {"data": [trace], "layout": layout}


def _point(r: RowResult, y: str) -> tuple[Any, Any] | None:
    if r.score is None:
        return None
    x, value = formatting.value_of(r.score, "latency_ms"), r.quality.get(y) or formatting.value_of(r.score, y)
    return (x, value) if x and value else None


def _arrow(r: RowResult, points: dict[str, Any], y: str) -> Figure:
    (x0, y0), (x1, y1) = points[str(r.planned.baseline)], points[r.planned.name]
    effect = r.effects.get(y)
    return {
        "x": x1.value,
        "y": y1.value,
        "ax": x0.value,
        "ay": y0.value,
        **{"xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "", "showarrow": True},
        **{"arrowhead": 3, "arrowsize": 1.1, "arrowwidth": 1.6, "standoff": 6, "startstandoff": 6},
        "arrowcolor": ARROW_COLORS.get(effect.verdict if effect else "", "var(--dominated)"),
    }


def _label(name: str, point: tuple[Any, Any]) -> Figure:
    x, y = point
    position = {"x": x.value, "y": y.value, "xanchor": "left", "yanchor": "bottom", "xshift": 5, "yshift": 3}
    return {**position, "text": name, "showarrow": False, "font": {"size": 13, "color": "var(--ink)"}}
