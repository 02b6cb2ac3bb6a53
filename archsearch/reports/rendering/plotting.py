"""Layout and front lines that several charts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
"""``data`` and ``layout`` as plotly.js takes them."""


def front_line(steps: Sequence[tuple[float, ...]], color: str, *, opacity: float) -> Figure:
    """A front's line, from point to point by way of what the better one of two still dominates."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [p[0] for p in steps],
        "y": [p[1] for p in steps],
        "line": {"shape": "hv", "width": 1.5, "color": color},
        "opacity": opacity,
        "hoverinfo": "skip",
    }


def base_layout(x: str, y: str) -> Figure:
    """What all charts share: no box, few lines, the page's own type and colours."""
    axis = {
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "linecolor": "var(--line)",
        "ticks": "",
        "nticks": 6,
    }
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
