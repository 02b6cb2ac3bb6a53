"""Charts of an evolving study: importance of every block in every round, and the path to the target latency."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from archsearch.reports.evolution.data import Evolution, RoundResult, lineage
from archsearch.reports.evolution.tables import PHASES, format_latency
from archsearch.reports.rendering import formatting, plotting
from archsearch.reports.rendering.plotting import Figure, markers, scatter
from archsearch.reports.study.data import StudyData, title
from archsearch.score import LatencyRecord
from archsearch.stats.estimate import Estimate
from archsearch.stats.pareto import front
from archsearch.studies.storage.rounds import BlockImportance
from snapgen.architecture.block_index import FIELDS, SHORT, BlockRef

ROW_PIXELS = 23
"""Height of a block's row on the map."""
SYMBOLS = {"robust": "square", "evolve": "circle", "final": "diamond"}


def importance_map(evolution: Evolution) -> Figure:
    """Heat map of the importance of every block: one row per block, one column per round.

    Importance is the quality lost per millisecond saved (arXiv 2306.00980, section 3.1: ΔCLIP / ΔLatency). Colors are
    asinh(importance / median), so that a few very important blocks do not hide differences between the others. Cells
    without a block are empty; × and + mark blocks that the next round removes and copies; a dot: not measured.
    """
    blocks = _all_blocks(evolution)
    by_round = [{i.block: i for i in r.round.worths} for r in evolution.rounds]
    values = [abs(i.value) for importances in by_round for i in importances.values()]
    scale = float(np.median([v for v in values if math.isfinite(v) and v] or [1.0]))
    colors = [[_color(importances.get(block.name), scale) for importances in by_round] for block in blocks]
    marks = [[_mark(evolution, block, result) for result in evolution.rounds] for block in blocks]
    hovers = [
        [
            _block_hover(block, result, importances.get(block.name))
            for result, importances in zip(evolution.rounds, by_round, strict=True)
        ]
        for block in blocks
    ]
    largest = max((abs(c) for row in colors for c in row if c is not None), default=1.0) or 1.0
    rounds = [r.round.number for r in evolution.rounds]
    heat = {
        "type": "heatmap",
        "x": rounds,
        "y": list(range(len(blocks))),
        "z": colors,
        "text": marks,
        "texttemplate": "%{text}",
        "textfont": {"size": 15},
        "hovertext": hovers,
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "zmin": -largest,
        "zmax": largest,
        "colorscale": [[0, "var(--knee)"], [0.5, "var(--grid)"], [1, "var(--front)"]],
        "colorbar": _color_bar(evolution, largest, scale),
    }
    without_importance = [
        (i, j)
        for i, block in enumerate(blocks)
        for j, result in enumerate(evolution.rounds)
        if block in result.blocks and colors[i][j] is None
    ]
    dots = scatter(
        [(rounds[j], i) for i, j in without_importance],
        "text",
        text=[marks[i][j] or "·" for i, j in without_importance],
        hovertext=[hovers[i][j] for i, j in without_importance],
        hoverinfo="text",
        textfont={"size": 18, "color": "var(--muted)"},
    )
    return {"data": [heat, dots], "layout": _map_layout(blocks, rounds)}


def _map_layout(blocks: Sequence[BlockRef], rounds: Sequence[int]) -> Figure:
    """Layout of the map: rounds at the top, blocks at the left, and left of them their sites, separated by lines."""
    layout = plotting.base_layout("Round", "")
    ticks = rounds[:: 1 + len(rounds) // 32]
    layout["xaxis"] |= {"side": "top", "showline": False, "tickvals": ticks, "ticktext": [str(n) for n in ticks]}
    layout["xaxis"]["range"] = [rounds[0] - 0.5, rounds[-1] + 0.5]
    layout["yaxis"] |= {
        "range": [len(blocks) - 0.5, -0.5],
        "showgrid": False,
        "tickvals": list(range(len(blocks))),
        "ticktext": [f"{SHORT[b.kind]} {b.layer}" + (f", no. {b.index + 1}" if b.index else "") for b in blocks],
    }
    sites = {
        site: [i for i, b in enumerate(blocks) if b.site == site] for site in dict.fromkeys(b.site for b in blocks)
    }
    left = {"xref": "paper", "x": 0, "xanchor": "right", "xshift": -104, "showarrow": False}
    font = {"size": 12.5, "color": "var(--ink)"}
    layout["annotations"] = [
        {**left, "y": (rows[0] + rows[-1]) / 2, "yanchor": "middle", "text": site, "font": font}
        for site, rows in sites.items()
    ]
    line = {"type": "line", "xref": "paper", "x0": -0.01, "x1": 1, "line": {"color": "var(--line)", "width": 1}}
    layout["shapes"] = [{**line, "y0": rows[0] - 0.5, "y1": rows[0] - 0.5} for rows in sites.values() if rows[0]]
    layout |= {
        "height": 80 + ROW_PIXELS * len(blocks),
        "margin": {"l": 168, "r": 12, "t": 58, "b": 12},
        "dragmode": False,
    }
    return layout


def _all_blocks(evolution: Evolution) -> list[BlockRef]:
    """Blocks of all rounds, each once, in the order of the forward pass."""
    sites = [site for site, _, _ in evolution.rounds[0].candidate.architecture.named_levels()]
    kinds = list(FIELDS)
    blocks = {block for result in evolution.rounds for block in result.blocks}
    return sorted(blocks, key=lambda b: (sites.index(b.site), b.layer, kinds.index(b.kind), b.index))


def _color(importance: BlockImportance | None, scale: float) -> float | None:
    if importance is None or not math.isfinite(importance.value):
        return None
    return math.asinh(importance.value / scale)


def _mark(evolution: Evolution, block: BlockRef, result: RoundResult) -> str:
    """Mark of a block that a child of the round removes (×) or copies (+)."""
    children = [child.round for parent, child in lineage(evolution) if parent is result]
    if any(block.name in r.removed for r in children):
        return "×"
    return "+" if any(block.name in r.copied for r in children) else ""


def _block_hover(block: BlockRef, result: RoundResult, importance: BlockImportance | None) -> str:
    head = f"<b>{html.escape(block.label)}</b>, round {result.round.number}"
    if importance is None:
        return f"{head}<br>{'not measured' if block in result.blocks else 'no such block'}"
    excludes_zero = importance.loss.low > 0 or importance.loss.high < 0
    lines = [
        head,
        f"quality lost without it: {formatting.format_interval(importance.loss)}",
        *([] if excludes_zero else ["(within noise)"]),
        f"costs {formatting.number(importance.ms)} ms",
    ]
    return "<br>".join([*lines, f"importance {formatting.number(importance.value)} per ms"])


def _color_bar(evolution: Evolution, largest: float, scale: float) -> Figure:
    """Color bar labeled with importances; ``largest`` is the end of the color scale, in asinh units."""
    upper = scale * math.sinh(largest)
    decades = range(math.floor(math.log10(scale)) - 1, math.ceil(math.log10(upper)) + 1)
    positive = [v for e in decades for v in (10.0**e, 3 * 10.0**e) if 0.5 * scale < v <= upper]
    ticks = [*(-v for v in reversed(positive)), 0.0, *positive]
    return {
        "title": {"text": f"Lost per ms saved:<br>{evolution.label(evolution.last.round.metric)}", "side": "right"},
        "tickvals": [math.asinh(v / scale) for v in ticks],
        "ticktext": [f"{v:g}".replace("-", "−") for v in ticks],
        "thickness": 12,
        "outlinewidth": 0,
        "ticks": "",
        "lenmode": "pixels",
        "len": 300,
        "y": 1,
        "yanchor": "top",
    }


def path_chart(evolution: Evolution, metric: str, other: StudyData | None = None) -> Figure:
    """Rounds by latency and quality, each joined to its parent by a line, and the target latency.

    Args:
        evolution: the evolving study.
        metric: quality metric on the vertical axis.
        other: a study whose candidates and Pareto front are drawn below the rounds.
    """
    points = {r.round.number: (r, r.latency, q) for r in evolution.rounds if r.latency and (q := r.quality(metric))}
    edges = [(a, b) for a, b in lineage(evolution) if a.round.number in points and b.round.number in points]
    data = _other_study(other, metric) if other else []
    line: list[tuple[float | None, float | None]] = []
    for edge in edges:
        line += [(latency.median_ms, q.value) for _, latency, q in (points[r.round.number] for r in edge)]
        line.append((None, None))  # plotly breaks a line at missing values
    data.append(scatter(line, "lines", line={"width": 1.5, "color": "var(--front)"}, opacity=0.6, hoverinfo="skip"))
    for phase, symbol in SYMBOLS.items():
        in_phase = [point for point in points.values() if point[0].round.phase == phase]
        if in_phase:
            data.append(_markers(evolution, in_phase, metric, symbol))
    title = formatting.axis("latency_ms", "", records=[latency for _, latency, _ in points.values()])
    layout = plotting.base_layout(title, evolution.label(metric))
    layout["shapes"], layout["annotations"] = _target(evolution)
    layout["annotations"] += _round_numbers({n: (latency.median_ms, q.value) for n, (_, latency, q) in points.items()})
    return {"data": data, "layout": layout}


def _markers(
    evolution: Evolution, points: Sequence[tuple[RoundResult, LatencyRecord, Estimate]], metric: str, symbol: str
) -> Figure:
    return markers([latency.estimate for _, latency, _ in points], [quality for _, _, quality in points]) | {
        "hovertext": [_round_hover(evolution, result, metric) for result, _, _ in points],
        "marker": {
            "symbol": symbol,
            "size": 10,
            "color": "var(--front)",
            "line": {"width": 1.5, "color": "var(--page)"},
        },
    }


def _round_hover(evolution: Evolution, result: RoundResult, metric: str) -> str:
    quality = result.quality(metric)
    assert quality is not None
    lines = [f"<b>Round {result.round.number}</b>, {PHASES[result.round.phase]}"]
    action = html.escape(evolution.action(result))
    lines += action.replace("; ", "<br>").replace(", ", ",<br>").split("<br>")
    if result.latency:
        lines.append(f"{format_latency(result.latency)} ms {result.latency.source}")
    lines.append(f"{formatting.number(result.round.predicted_ms)} ms by the block table")
    return "<br>".join([*lines, f"{html.escape(evolution.label(metric))} {formatting.format_interval(quality)}"])


def _round_numbers(points: Mapping[int, tuple[float, float]]) -> list[Figure]:
    """Labels with the round numbers next to the points; labels of close points are put on different sides."""
    spans = [max(values) - min(values) or 1.0 for values in zip(*points.values(), strict=True)]
    anchors = (("left", "bottom"), ("right", "top"), ("left", "top"), ("right", "bottom"))
    notes: list[Figure] = []
    for number, (x, y) in points.items():
        near = sum(abs(x - n["x"]) < 0.03 * spans[0] and abs(y - n["y"]) < 0.06 * spans[1] for n in notes)
        x_anchor, y_anchor = anchors[near % len(anchors)]
        shift = {"xshift": 5 if x_anchor == "left" else -5, "yshift": 2 if y_anchor == "bottom" else -2}
        position = {"x": x, "y": y, "xanchor": x_anchor, "yanchor": y_anchor, **shift, "showarrow": False}
        notes.append({**position, "text": str(number), "font": {"size": 12, "color": "var(--ink)"}})
    return notes


def _target(evolution: Evolution) -> tuple[list[Figure], list[Figure]]:
    """Shapes and label of the target latency: a line, and a band for its tolerance."""
    settings = evolution.settings
    full_height = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    band = {
        "type": "rect",
        "x0": settings.min_ms,
        "x1": settings.max_ms,
        "fillcolor": "var(--tint)",
        "line": {"width": 0},
    }
    line = {"type": "line", "x0": settings.target_ms, "x1": settings.target_ms}
    line["line"] = {"color": "var(--knee)", "width": 1, "dash": "dot"}
    note = {
        "x": settings.target_ms,
        "y": 1,
        "xref": "x",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "top",
        "xshift": 4,
    }
    note |= {"text": f"target {settings.target_ms:.3g} ms", "showarrow": False}
    note["font"] = {"size": 12, "color": "var(--knee)"}
    return [band | full_height, line | full_height], [note]


def _other_study(study: StudyData, metric: str) -> list[Figure]:
    """Traces of another study: its Pareto front by latency and the metric, and its candidates."""
    points = [
        (c, x.value, y.value)
        for c in study.scored
        # A huge loss is a failed training and would stretch the axis.
        if (x := study.value_of(c, "latency_ms")) and (y := study.value_of(c, metric)) and y.value < 1e5
    ]
    on_front = front([(x, y) for _, x, y in points])
    hovers = [
        f"<b>{html.escape(f'{study.name}, {title(c)}')}</b><br>{formatting.number(x)} ms, {formatting.number(y)}"
        for c, x, y in points
    ]
    colors = ["var(--knee)" if (x, y) in on_front else "var(--dominated)" for _, x, y in points]
    marker = {"symbol": "circle", "size": 7, "color": colors}
    return [
        plotting.front_line(on_front, "var(--knee)", opacity=0.7),
        scatter([(x, y) for _, x, y in points], hovertext=hovers, hoverinfo="text", marker=marker),
    ]
