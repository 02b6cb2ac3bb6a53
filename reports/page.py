"""Puts the page together: what stands in each of its sections, and the file that holds it all."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from reports import amounts, charts, samples, words
from reports.agreement import Agreement, agreement
from reports.facts import Facts, title
from reports.hypervolume import box
from reports.knobs import knob_table
from studies.trials import Candidate

FIT_TO_RANK = 0.7
"""Rank agreement between seeds under which the page says that the score does not rank."""


def render(facts: Facts, *, audit: str = "") -> str:
    """The page as HTML: its style, its script, plotly and the data are inside.

    Args:
        audit: HTML of the proxy audit's section, if there is one (`reports.audit.section`).
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    agreements = agreements_of(facts)
    context = {
        "facts": facts,
        "headline": _headline(facts),
        "tiles": _tiles(facts),
        "warnings": warnings(facts, agreements),
        "recommended": _recommended(facts),
        "axes": [[(n, amounts.axis(n, facts.extractor)) for n in side] for side in charts.views(facts)],
        "picks": [(c.number, title(c), c.number in facts.front) for c in _shown(facts)],
        "knobs": knob_table(facts, facts.objectives),
        "others": knob_table(facts, [n for n in facts.measures if n not in facts.objectives]),
        "reference": _reference(facts),
        "agreements": [_agreement_row(facts, name, found) for name, found in agreements.items()],
        "table": _table(facts),
        "sources": sources(facts),
        "protocol": _flat(facts.attrs["protocol"]),
        "machine": _flat(facts.attrs.get("machine", {})),
        "settings": _flat({k: v for k, v in facts.attrs["settings"].items() if k != "protocol"}),
        "audit": Markup(audit) if audit else "",
        "style": Markup(_resource("report.css")),
        "script": Markup(_resource("report.js")),
        "plotly": Markup(get_plotlyjs().replace("</script", "<\\/script")),
        "data": Markup(embedded(_data(facts, list(agreements)))),
    }
    return environment.from_string(_resource("report.html")).render(context)


def embedded(value: object) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("reports").joinpath(name).read_text()


def _headline(facts: Facts) -> str:
    space = facts.attrs["space"]
    size = math.prod(len(f.choices) for f in facts.factors)
    goals = " and ".join(facts.label(name) for name in facts.objectives)
    return (
        f"Space {space['name']}: {len(facts.factors)} knobs, {size:,} combinations. "
        f"Minimised: {goals}{_where_timed(facts)}."
    )


def _where_timed(facts: Facts) -> str:
    records = {c.score.latency.device: c.score.latency.source for c in facts.scored if c.score.latency}
    return " (" + ", ".join(f"{source} on {device}" for device, source in records.items()) + ")" if records else ""


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    counts = Counter(c.state for c in facts.candidates)
    outside = counts["infeasible"] + sum(c.state == "scored" and not c.feasible for c in facts.candidates)
    reused = sum(c.reused_from is not None for c in facts.candidates)
    seconds = sum(c.seconds for c in facts.candidates)
    tiles = [(f"{len(facts.scored)}", "scored"), (f"{len(facts.front)}", "on the front")]
    tiles += [(f"{outside}", "outside the limits"), (f"{reused}", "reused")]
    tiles += [(f"{counts[state]}", state) for state in ("failed", "running") if counts[state]]
    return [*tiles, (_duration(seconds), "worked")] if seconds >= 1 else tiles


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def agreements_of(facts: Facts) -> dict[str, Agreement]:
    """Each quality metric's agreement between seeds; empty for a protocol of one seed."""
    names = [n for n in facts.measures if n in amounts.QUALITIES]
    return {name: agreement([e for _, e in estimates(facts, name)]) for name in names}


def estimates(facts: Facts, name: str) -> list[tuple[Candidate, Any]]:
    """Every trained candidate and its estimate of one metric."""
    return [(c, getattr(c.score.quality, name)) for c in facts.trained if getattr(c.score.quality, name)]


def warnings(facts: Facts, agreements: Mapping[str, Agreement]) -> list[str]:
    """What a reader must know before they trust the page, worst first."""
    found = []
    conditions = {c.score.latency.conditions for c in facts.scored if c.score.latency}
    if len(conditions) > 1:
        found.append(f"Latency was taken under {len(conditions)} different conditions (see Sources): not comparable.")
    for name in facts.objectives:
        if name in agreements:
            found += _doubts(facts.label(name), agreements[name])
    if len(facts.scored) < 10:
        found.append(f"Only {len(facts.scored)} candidates are scored: the front will move.")
    unsteady = sum(not c.score.latency.steady for c in facts.scored if c.score.latency)
    if unsteady:
        found.append(f"{unsteady} of {len(facts.scored)} latencies did not settle in the time given to them.")
    lost = sum(charts.diverged(c) for c in facts.candidates)
    if lost:
        found.append(f"Training diverged for {lost} candidates; they stand in the table only.")
    failed = [c for c in facts.candidates if c.state == "failed"]
    if failed:
        cause = f": {failed[0].error}" if failed[0].error else ""
        found.append(f"{len(failed)} candidates failed; the first, trial {failed[0].number}{cause}.")
    running = sum(c.state == "running" for c in facts.candidates)
    if running:
        found.append(f"The study has not finished: {running} candidates are running.")
    return found


def _doubts(label: str, found: Agreement) -> list[str]:
    doubts = []
    if found.rho is None:
        doubts.append(f"Whether {label} repeats from seed to seed cannot be told from {found.n} candidates.")
    elif found.rho.value < FIT_TO_RANK:
        doubts.append(
            f"Two seeds agree on the order by {label} only to ρ = {found.rho.value:.2f} (n = {found.n}): "
            "do not rank close candidates by it."
        )
    if found.apart is not None and found.apart < 0.5:
        doubts.append(f"Only {found.apart:.0%} of pairs of candidates differ in {label} by more than their intervals.")
    return doubts


def _recommended(facts: Facts) -> dict[str, Any]:
    base = next((c for c in facts.distinct if c.name == "base"), None)
    rows = [_beside(facts, name, base) for name in facts.measures if facts.amount(facts.best, name)]
    return {
        "title": title(facts.best),
        "id": facts.best.architecture.id,
        "number": facts.best.number,
        "reason": facts.reason[:1].upper() + facts.reason[1:] + ".",
        "words": words.describe(facts.best.architecture),
        "rows": rows,
        "compared": base is not None and base.number != facts.best.number,
    }


def _beside(facts: Facts, name: str, base: Candidate | None) -> dict[str, str]:
    mine = facts.amount(facts.best, name)
    theirs = facts.amount(base, name) if base else None
    assert mine is not None
    row = {"label": facts.label(name), "mine": amounts.spoken(mine, name), "base": "–", "change": "", "verdict": ""}
    if theirs is None:
        return row
    row["base"] = amounts.spoken(theirs, name)
    if name in amounts.QUALITIES and mine.low <= theirs.high and theirs.low <= mine.high:
        return row | {"change": "within the intervals"}
    ratio = mine.value / theirs.value - 1 if theirs.value > 0 else math.nan
    if math.isfinite(ratio) and mine.value != theirs.value:
        row["change"] = f"{'+' if ratio > 0 else '−'}{abs(ratio):.1%}".replace("%", " %")
        row["verdict"] = "worse" if ratio > 0 else "better"
    return row


def _shown(facts: Facts) -> list[Candidate]:
    """Candidates in the order in which one wants to look at them: best, front, named, the others."""
    return sorted(
        facts.candidates,
        key=lambda c: (c.number != facts.best.number, c.number not in facts.front, c.name is None, c.slot),
    )


def _reference(facts: Facts) -> str:
    points = [
        tuple(i.value for n in facts.objectives if (i := facts.amount(c, n)))
        for c in facts.scored
        if not charts.diverged(c)
    ]
    _, worst = box(points)
    units = [amounts.unit(name) for name in facts.objectives]
    ends = (
        f"{facts.label(n)} {amounts.number(w)} {u}".strip()
        for n, w, u in zip(facts.objectives, worst, units, strict=True)
    )
    return ", ".join(ends)


def _agreement_row(facts: Facts, name: str, found: Agreement) -> dict[str, str]:
    rho = found.rho
    return {
        "name": name,
        "label": facts.label(name),
        "n": str(found.n),
        "rho": f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]" if rho else "cannot tell",
        "apart": f"{found.apart:.0%}" if found.apart is not None else "–",
        "spread": f"{found.spread:.1f} ×" if found.spread is not None else "–",
        "drawn": "yes" if found.n >= 2 else "",
    }


def sources(facts: Facts) -> list[tuple[str, str]]:
    """Where each of the score's numbers comes from."""
    seeds = len(facts.seeds)
    rows = []
    for name in facts.measures:
        if name in amounts.QUALITIES:
            how = f"measured here: mean of {seeds} short runs under protocol {_hash(facts)}, with 95 % interval"
            rows.append((facts.label(name), how))
        elif name != "latency_ms":
            rows.append((facts.label(name), "counted, exact"))
    timed = [c.score.latency for c in facts.distinct if c.score.latency]
    for (source, *where), count in Counter(record.conditions for record in timed).items():
        device, units, chip, threads, runtime = where
        runs = [r.runs for r in timed if r.conditions == (source, *where)]
        span = f"{min(runs)}–{max(runs)}" if min(runs) < max(runs) else str(min(runs))
        how = f"{source} on {device} ({units}), {chip}, {threads} thread(s), {runtime}: {count} candidates, "
        rows.append((facts.label("latency_ms"), how + f"median and quartiles of {span} runs each"))
    return rows


def _hash(facts: Facts) -> str:
    return next((c.score.quality.protocol_hash for c in facts.trained if c.score.quality), "")


def _table(facts: Facts) -> dict[str, Any]:
    columns = [(name, amounts.axis(name, facts.extractor)) for name in facts.measures]
    return {
        "columns": columns,
        "knobs": [f.name for f in facts.factors],
        "rows": [_row(facts, c) for c in facts.candidates],
    }


def _row(facts: Facts, candidate: Candidate) -> dict[str, Any]:
    cells = []
    for name in facts.measures:
        found = facts.amount(candidate, name) if candidate.score.cost.params else None
        cells.append((found.value, _bare(amounts.spoken(found, name, ends=True), name)) if found else (None, "–"))
    return {
        "number": candidate.number,
        "title": title(candidate),
        "id": candidate.architecture.id,
        "departures": [f"{knob}: {choice}" for knob, choice in facts.departures(candidate).items()],
        "choices": [facts.choices(candidate).get(f.name, "–") for f in facts.factors],
        "indices": [candidate.point.get(f.name, -1) for f in facts.factors],
        "cells": cells,
        "state": state_of(facts, candidate),
        "scored": candidate in facts.scored,
        "front": candidate.number in facts.front,
        "best": candidate.number == facts.best.number,
    }


def _bare(text: str, name: str) -> str:
    """Without the unit, which the column's head has."""
    return text.replace(f" {amounts.unit(name)}", "", 1) if amounts.unit(name) else text


def state_of(facts: Facts, candidate: Candidate) -> str:
    """In words: on the front, scored, reused, outside the limits (which, by how much), failed (why), running."""
    if candidate.number in facts.front:
        return "on the front"
    if candidate.reused_from is not None:
        return f"same as trial {candidate.reused_from}"
    if charts.diverged(candidate):
        return "diverged"
    if candidate.infeasible:
        return f"outside: {candidate.infeasible}"
    return f"failed: {candidate.error}" if candidate.error else candidate.state


def _data(facts: Facts, metrics: Sequence[str]) -> dict[str, Any]:
    down, across = charts.views(facts)
    figures = {f"{y}/{x}": charts.front_chart(facts, y, x) for y in down for x in across if x != y}
    scatters = {f"seeds-{n}": charts.seeds_chart(facts, estimates(facts, n)) for n in metrics if len(facts.seeds) > 1}
    pictures = samples.embedded(_pictures(facts))
    return {
        "best": facts.best.number,
        "fronts": figures,
        "charts": {"hypervolume": charts.hypervolume_chart(facts), **scatters},
        "candidates": {c.number: _candidate(facts, c) for c in facts.candidates},
        "samples": pictures,
    }


def _pictures(facts: Facts) -> list[tuple[int, Path]]:
    folder = Path(facts.attrs.get("artifacts", "."))
    return [(c.number, folder / c.artifacts["samples.png"]) for c in _shown(facts) if "samples.png" in c.artifacts]


def _candidate(facts: Facts, candidate: Candidate) -> dict[str, Any]:
    known = candidate.score.cost.params > 0
    found = [(n, i) for n in facts.measures if known and (i := facts.amount(candidate, n))]
    numbers = [(facts.label(n), amounts.spoken(i, n, ends=True)) for n, i in found]
    said = words.describe(candidate.architecture)
    lines = [f"{label}: {text}" for label, text in numbers[:4]] + textwrap.wrap(said, 58)
    hover = [f"<b>{html.escape(title(candidate))}</b>", *map(html.escape, lines)]
    return {
        "title": title(candidate),
        "id": candidate.architecture.id,
        "state": state_of(facts, candidate),
        "words": said,
        "differs": words.differences(candidate.architecture, facts.base),
        "numbers": numbers,
        "hover": "<br>".join(hover),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted names."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
