"""Layout and traces shared by the charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from archsearch.stats.estimate import Estimate

Figure = dict[str, Any]
"""``data`` and ``layout`` of a plotly.js figure."""

LINE_COLORS = ("var(--front)", "var(--knee)", "var(--ink)", "var(--dominated)", "var(--better)", "var(--worse)")
"""Colors of lines that are told apart by a legend."""

LINE_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Their dashes, for readers and printers that do not tell the colors apart."""


def scatter(points: Iterable[tuple[Any, ...]], mode: str = "markers", **settings: Any) -> Figure:
    """Trace of points (x, y)."""
    points = list(points)
    return {"type": "scatter", "mode": mode, "x": [p[0] for p in points], "y": [p[1] for p in points], **settings}


def front_line(points: Sequence[tuple[float, ...]], color: str, *, opacity: float) -> Figure:
    """Trace of a Pareto front as a staircase: the edge of the region that its points dominate."""
    line = {"shape": "hv", "width": 1.5, "color": color}
    return scatter(points, "lines", line=line, opacity=opacity, hoverinfo="skip")


def markers(x: Sequence[Estimate], y: Sequence[Estimate], color: str = "var(--dominated)") -> Figure:
    """Trace of points with error bars in ``color``."""
    points = [(a.value, b.value) for a, b in zip(x, y, strict=True)]
    return scatter(points, error_x=error_bars(x, color), error_y=error_bars(y, color), hoverinfo="text")


def error_bars(intervals: Sequence[Estimate], color: str) -> Figure:
    """Error bars of points from the ends of their intervals."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [i.high - i.value for i in intervals],
        "arrayminus": [i.value - i.low for i in intervals],
        "color": color,
        "thickness": 1,
        "width": 0,
        "visible": any(i.high > i.low for i in intervals),
    }


def lines(named: Mapping[str, Iterable[tuple[float, float]]], x: str, y: str, mode: str = "lines") -> Figure:
    """A figure of lines with a legend."""
    traces = [
        scatter(
            points,
            mode,
            name=name,
            line={"color": LINE_COLORS[i % len(LINE_COLORS)], "dash": LINE_DASHES[i % len(LINE_DASHES)]},
            marker={"symbol": i},
        )
        for i, (name, points) in enumerate(named.items())
    ]
    legend = {"orientation": "h", "y": -0.22}
    return {"data": traces, "layout": {**base_layout(x, y), "showlegend": True, "legend": legend}}


def base_layout(x: str, y: str) -> Figure:
    """Layout shared by all charts: no box, few grid lines, the page's font and colors."""
    axis = {"gridcolor": "var(--grid)", "zeroline": False, "linecolor": "var(--line)", "ticks": "", "nticks": 6}
    # The unit is in the title: plotly's own "1.2M" for 1,200,000 would stand under "MACs (M)".
    axis |= {"exponentformat": "none", "separatethousands": True, "automargin": True}
    return {
        "xaxis": {**axis, "title": {"text": x, "standoff": 10}, "showgrid": False, "showline": True},
        "yaxis": {**axis, "title": {"text": y, "standoff": 10}},
        "margin": {"l": 66, "r": 12, "t": 12, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--muted)", "size": 12.5},
        "hoverlabel": {
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--dominated)", "activecolor": "var(--ink)"},
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": "pan",
    }
