"""The charts of an evolving study: worth of every block, round by round, and the path to the target."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from archsearch.reports.evolution.data import Evolution, RoundResult, lineage
from archsearch.reports.evolution.tables import PHASES
from archsearch.reports.rendering import formatting, plotting
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study.data import StudyData, title
from archsearch.stats.estimate import Estimate
from archsearch.stats.pareto import front
from archsearch.studies.evolution.rounds import BlockImportance
from snapgen.architecture.block_index import FIELDS, SHORT, BlockRef

ROW = 23
"""Pixels of a block's row on the map."""
SYMBOLS = {"robust": "square", "evolve": "circle", "final": "diamond"}


def worth_map(evolution: Evolution) -> Figure:
    """Worth a millisecond of every block (down, in the order of the forward pass) in every round (across).

    Colours go by asinh of the worth over its median size, so that the few very worthy blocks leave the others apart.
    Cells without a block are empty; × and + mark what the next round removes and copies; a dot: not valued.
    """
    every = _union(evolution)
    worths = [{w.block: w for w in s.round.worths} for s in evolution.steps]
    scale = _scale([w.value for found in worths for w in found.values()])
    colours = [[_colour(found.get(block.name), scale) for found in worths] for block in every]
    marks = [[_mark(evolution, block, step) for step in evolution.steps] for block in every]
    told = [
        [_told(block, step, found.get(block.name)) for step, found in zip(evolution.steps, worths, strict=True)]
        for block in every
    ]
    ends = max((abs(c) for row in colours for c in row if c is not None), default=1.0) or 1.0
    rounds = [s.round.number for s in evolution.steps]
    heat = {
        "type": "heatmap",
        "x": rounds,
        "y": list(range(len(every))),
        "z": colours,
        "text": marks,
        "texttemplate": "%{text}",
        "textfont": {"size": 15},
        "hovertext": told,
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "zmin": -ends,
        "zmax": ends,
        "colorscale": [[0, "var(--knee)"], [0.5, "var(--grid)"], [1, "var(--front)"]],
        "colorbar": _bar(evolution, ends, scale),
    }
    dots = [
        (i, j)
        for i, block in enumerate(every)
        for j, step in enumerate(evolution.steps)
        if block in step.blocks and colours[i][j] is None
    ]
    silent = {
        "type": "scatter",
        "mode": "text",
        "x": [rounds[j] for _, j in dots],
        "y": [i for i, _ in dots],
        "text": [marks[i][j] or "·" for i, j in dots],
        "hovertext": [told[i][j] for i, j in dots],
        "hoverinfo": "text",
        "textfont": {"size": 18, "color": "var(--muted)"},
    }
    return {"data": [heat, silent], "layout": _map_layout(every, rounds)}


def _map_layout(every: Sequence[BlockRef], rounds: Sequence[int]) -> Figure:
    """Rounds above, blocks at the left, and the sites left of them, with a line between two."""
    layout = plotting.base_layout("Round", "")
    shown = rounds[:: 1 + len(rounds) // 32]
    layout["xaxis"] |= {"side": "top", "showline": False, "tickvals": shown, "ticktext": [str(n) for n in shown]}
    layout["xaxis"]["range"] = [rounds[0] - 0.5, rounds[-1] + 0.5]
    layout["yaxis"] |= {
        "range": [len(every) - 0.5, -0.5],
        "showgrid": False,
        "tickvals": list(range(len(every))),
        "ticktext": [_row(b) for b in every],
    }
    sites = {site: [i for i, b in enumerate(every) if b.site == site] for site in dict.fromkeys(b.site for b in every)}
    place = {"xref": "paper", "x": 0, "xanchor": "right", "xshift": -104, "showarrow": False}
    font = {"size": 12.5, "color": "var(--ink)"}
    layout["annotations"] = [
        {**place, "y": (rows[0] + rows[-1]) / 2, "yanchor": "middle", "text": site, "font": font}
        for site, rows in sites.items()
    ]
    line = {"type": "line", "xref": "paper", "x0": -0.01, "x1": 1, "line": {"color": "var(--line)", "width": 1}}
    layout["shapes"] = [{**line, "y0": rows[0] - 0.5, "y1": rows[0] - 0.5} for rows in sites.values() if rows[0]]
    layout |= {"height": 80 + ROW * len(every), "margin": {"l": 168, "r": 12, "t": 58, "b": 12}, "dragmode": False}
    return layout


def _union(evolution: Evolution) -> list[BlockRef]:
    """Every block of any round, in the order of the forward pass."""
    sites = [site for site, _, _ in evolution.steps[0].candidate.architecture.sites()]
    kinds = list(FIELDS)
    found = {block for step in evolution.steps for block in step.blocks}
    return sorted(found, key=lambda b: (sites.index(b.site), b.layer, kinds.index(b.kind), b.index))


def _row(block: BlockRef) -> str:
    return f"{SHORT[block.kind]} {block.layer}" + (f", no. {block.index + 1}" if block.index else "")


def _scale(values: Sequence[float]) -> float:
    sizes = [abs(v) for v in values if math.isfinite(v) and v]
    return float(np.median(sizes)) if sizes else 1.0


def _colour(worth: BlockImportance | None, scale: float) -> float | None:
    if worth is None or not math.isfinite(worth.value):
        return None
    return math.asinh(worth.value / scale)


def _mark(evolution: Evolution, block: BlockRef, step: RoundResult) -> str:
    """What is done next to a block of a round's network."""
    following = [after.round for before, after in lineage(evolution) if before is step]
    if any(block.name in r.removed for r in following):
        return "×"
    return "+" if any(block.name in r.copied for r in following) else ""


def _told(block: BlockRef, step: RoundResult, worth: BlockImportance | None) -> str:
    head = f"<b>{html.escape(block.label)}</b>, round {step.round.number}"
    if worth is None:
        return f"{head}<br>{'not valued' if block in step.blocks else 'not there'}"
    sure = "" if worth.loss.low > 0 or worth.loss.high < 0 else ": cannot be told from none"
    lines = [
        head,
        f"lost without it: {formatting.format_interval(worth.loss)}{sure}",
        f"costs {formatting.number(worth.ms)} ms",
    ]
    return "<br>".join([*lines, f"worth {formatting.number(worth.value)} a ms"])


def _bar(evolution: Evolution, ends: float, scale: float) -> Figure:
    """The colours' scale with worths, not their asinh, on it."""
    most = scale * math.sinh(ends)
    decades = range(math.floor(math.log10(scale)) - 1, math.ceil(math.log10(most)) + 1)
    kept = [v for e in decades for v in (10.0**e, 3 * 10.0**e) if 0.5 * scale < v <= most]
    ticks = [*(-v for v in reversed(kept)), 0.0, *kept]
    return {
        "title": {"text": f"Lost without it, a ms:<br>{evolution.label(evolution.last.round.metric)}", "side": "right"},
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
    """Rounds in the plane of latency and quality, each joined to the one that it came from, and the target.

    Args:
        other: a study whose candidates and front are drawn under them.
    """
    placed = {s.round.number: (s, s.latency, q) for s in evolution.steps if s.latency and (q := s.quality(metric))}
    edges = [(a, b) for a, b in lineage(evolution) if a.round.number in placed and b.round.number in placed]
    data = _others(other, metric) if other else []
    line: list[tuple[float | None, float | None]] = []
    for pair in edges:
        line += [(record.median_ms, q.value) for _, record, q in (placed[s.round.number] for s in pair)] + [
            (None, None)
        ]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [x for x, _ in line],
            "y": [y for _, y in line],
            "line": {"width": 1.5, "color": "var(--front)"},
            "opacity": 0.6,
            "hoverinfo": "skip",
        }
    )
    for phase, symbol in SYMBOLS.items():
        some = [one for one in placed.values() if one[0].round.phase == phase]
        if some:
            data.append(_points(evolution, some, metric, symbol))
    source = next((record.source for _, record, _ in placed.values()), "measured")
    layout = plotting.base_layout(f"Latency (ms, {source})", evolution.label(metric))
    layout["shapes"], layout["annotations"] = _target(evolution)
    layout["annotations"] += _numbers({number: (r.median_ms, q.value) for number, (_, r, q) in placed.items()})
    return {"data": data, "layout": layout}


def _points(
    evolution: Evolution, some: Sequence[tuple[RoundResult, object, Estimate]], metric: str, symbol: str
) -> Figure:
    records = [s.latency for s, _, _ in some if s.latency]
    qualities = [q for _, _, q in some]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [r.median_ms for r in records],
        "y": [q.value for q in qualities],
        "error_x": _bars([(r.lower_quartile_ms, r.median_ms, r.upper_quartile_ms) for r in records]),
        "error_y": _bars([(q.low, q.value, q.high) for q in qualities]),
        "hovertext": [_said(evolution, s, metric) for s, _, _ in some],
        "hoverinfo": "text",
        "marker": {
            "symbol": symbol,
            "size": 10,
            "color": "var(--front)",
            "line": {"width": 1.5, "color": "var(--page)"},
        },
    }


def _bars(ends: Sequence[tuple[float, float, float]]) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for _, value, high in ends],
        "arrayminus": [value - low for low, value, _ in ends],
        "color": "var(--dominated)",
        "thickness": 1,
        "width": 0,
    }


def _said(evolution: Evolution, step: RoundResult, metric: str) -> str:
    quality = step.quality(metric)
    assert quality is not None
    lines = [f"<b>Round {step.round.number}</b>, {PHASES[step.round.phase]}"]
    action = html.escape(evolution.action(step))
    lines += action.replace("; ", "<br>").replace(", ", ",<br>").split("<br>")
    if step.latency:
        lines.append(f"{formatting.number(step.latency.median_ms)} ms {step.latency.source}")
    lines.append(f"{formatting.number(step.round.predicted_ms)} ms by the block table")
    return "<br>".join([*lines, f"{html.escape(evolution.label(metric))} {formatting.format_interval(quality)}"])


def _numbers(points: Mapping[int, tuple[float, float]]) -> list[Figure]:
    """The rounds' numbers beside their points, those of near neighbours on different sides."""
    spans = [max(ends) - min(ends) or 1.0 for ends in zip(*points.values(), strict=True)]
    sides = (("left", "bottom"), ("right", "top"), ("left", "top"), ("right", "bottom"))
    notes: list[Figure] = []
    for number, (x, y) in points.items():
        near = sum(abs(x - n["x"]) < 0.03 * spans[0] and abs(y - n["y"]) < 0.06 * spans[1] for n in notes)
        across, down = sides[near % len(sides)]
        shift = {"xshift": 5 if across == "left" else -5, "yshift": 2 if down == "bottom" else -2}
        where = {"x": x, "y": y, "xanchor": across, "yanchor": down, **shift, "showarrow": False}
        notes.append({**where, "text": str(number), "font": {"size": 12, "color": "var(--ink)"}})
    return notes


def _target(evolution: Evolution) -> tuple[list[Figure], list[Figure]]:
    """The target as a line, with its tolerance behind it."""
    how = evolution.settings
    tall = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    band = {"type": "rect", "x0": how.least_ms, "x1": how.most_ms, "fillcolor": "var(--tint)", "line": {"width": 0}}
    line = {"type": "line", "x0": how.target_ms, "x1": how.target_ms}
    line["line"] = {"color": "var(--knee)", "width": 1, "dash": "dot"}
    note = {"x": how.target_ms, "y": 1, "xref": "x", "yref": "paper", "xanchor": "left", "yanchor": "top", "xshift": 4}
    note |= {"text": f"target {how.target_ms:.3g} ms", "showarrow": False, "font": {"size": 12, "color": "var(--knee)"}}
    return [band | tall, line | tall], [note]


def _others(other: StudyData, metric: str) -> list[Figure]:
    """The other study's candidates, and the front of the two numbers."""
    points = [
        (c, x.value, y.value)
        for c in other.scored
        if (x := other.amount(c, "latency_ms")) and (y := other.amount(c, metric)) and y.value < 1e5
    ]
    steps = front([(x, y) for _, x, y in points])
    return [
        plotting.front_line(steps, "var(--knee)", opacity=0.7),
        {
            "type": "scatter",
            "mode": "markers",
            "x": [x for _, x, _ in points],
            "y": [y for _, _, y in points],
            "hovertext": [
                f"<b>{html.escape(f'{other.name}, {title(c)}')}</b><br>"
                f"{formatting.number(x)} ms, {formatting.number(y)}"
                for c, x, y in points
            ],
            "hoverinfo": "text",
            "marker": {
                "symbol": "circle",
                "size": 7,
                "color": ["var(--knee)" if (x, y) in steps else "var(--dominated)" for _, x, y in points],
            },
        },
    ]
