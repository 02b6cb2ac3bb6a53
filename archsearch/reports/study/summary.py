"""What the top of the page says: what was done, what to take, what to mind, and where each number comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from archsearch.reports.rendering import architecture_text, formatting
from archsearch.reports.study.data import StudyData, diverged, estimates, title
from archsearch.reports.study.seed_agreement import Agreement, agreement
from archsearch.score import QUALITY_METRICS
from archsearch.stats.main_effects import EffectInterval
from archsearch.stats.pareto import box
from archsearch.studies.search.candidates import Candidate

FIT_TO_RANK = 0.7
"""Rank agreement between seeds under which the page says that the score does not rank."""

FEW = 10
"""Candidates under which a front is a beginning, and the agreement of seeds is no verdict."""


def headline(facts: StudyData) -> str:
    space = facts.attrs["space"]
    size = math.prod(len(f.choices) for f in facts.factors)
    goals = " and ".join(facts.label(name) for name in facts.objectives)
    return (
        f"Space {space['name']}: {len(facts.factors)} knobs, {size:,} combinations. "
        f"Minimised: {goals}{_where_timed(facts)}."
    )


def _where_timed(facts: StudyData) -> str:
    records = {c.score.latency.device: c.score.latency.source for c in facts.scored if c.score.latency}
    return " (" + ", ".join(f"{source} on {device}" for device, source in records.items()) + ")" if records else ""


def tiles(facts: StudyData) -> list[tuple[str, str]]:
    counts = Counter(c.state for c in facts.candidates)
    outside = counts["infeasible"] + sum(c.state == "scored" and not c.feasible for c in facts.candidates)
    reused = sum(c.reused_from is not None for c in facts.candidates)
    seconds = sum(c.seconds for c in facts.candidates)
    tiles = [(f"{len(facts.scored)}", "scored"), (f"{len(facts.front)}", "on the front")]
    tiles += [(f"{outside}", "outside the limits"), (f"{reused}", "reused")]
    tiles += [(f"{counts[state]}", state) for state in ("failed", "running") if counts[state]]
    return [*tiles, (_duration(seconds), "of work")] if seconds >= 1 else tiles


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def agreements_of(facts: StudyData) -> dict[str, Agreement]:
    """Each quality metric's agreement between seeds; empty for a protocol of one seed."""
    names = [n for n in facts.measures if n in QUALITY_METRICS]
    return {name: agreement([e for _, e in estimates(facts, name)]) for name in names}


def warnings(facts: StudyData, agreements: Mapping[str, Agreement]) -> list[str]:
    """What a reader must know before they trust the page, worst first."""
    found = _of_latency(facts)
    for name in facts.objectives:
        if name in agreements:
            found += _of_agreement(facts.label(name), agreements[name], len(facts.seeds))
    if len(facts.scored) < FEW:
        found.append(f"Only {_are(len(facts.scored))} scored: the front will move.")
    return found + _of_trials(facts)


def _of_latency(facts: StudyData) -> list[str]:
    records = [c.score.latency for c in facts.scored if c.score.latency]
    found = []
    conditions = {record.conditions for record in records}
    if len(conditions) > 1:
        found.append(f"Latency was taken under {len(conditions)} different conditions (see Sources): not comparable.")
    unsteady = sum(not record.steady for record in records)
    if unsteady:
        found.append(f"{unsteady} of {len(records)} latencies did not settle in the time given to them.")
    return found


def _of_agreement(label: str, found: Agreement, seeds: int) -> list[str]:
    doubts = []
    if seeds < 2:
        doubts.append(f"With a single seed, whether {label} repeats is not known.")
    elif found.rho is None:
        doubts.append(f"Whether {label} repeats from seed to seed cannot be told from {_count(found.n)}.")
    elif found.rho.rho < FIT_TO_RANK:
        rho = f"ρ = {found.rho.rho:.2f} (n = {found.n})"
        doubts.append(f"Two seeds agree on the order by {label} only to {rho}: do not rank by it.")
    if found.apart is not None and found.apart < 0.5:
        share = formatting.percent(found.apart)
        doubts.append(f"Only {share} of pairs of candidates differ in {label} by more than their intervals.")
    return doubts


def _of_trials(facts: StudyData) -> list[str]:
    found = []
    lost = sum(diverged(c) for c in facts.candidates)
    if lost:
        found.append(f"Training diverged for {_count(lost)}, left out of every chart.")
    failed = [c for c in facts.candidates if c.state == "failed"]
    if failed:
        cause = f": {failed[0].error}" if failed[0].error else ""
        found.append(f"{_count(len(failed))} failed; the first, trial {failed[0].number}{cause}.")
    running = sum(c.state == "running" for c in facts.candidates)
    if running:
        found.append(f"The study has not finished: {_are(running)} running.")
    return found


def _count(number: int) -> str:
    return f"{number} candidate{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return f"{_count(number)} {'is' if number == 1 else 'are'}"


def verdicts(facts: StudyData, agreements: Mapping[str, Agreement]) -> list[str]:
    """A sentence for each quality metric: whether it ranks, and whether candidates differ by more than its noise."""
    return [_verdict(facts.label(name), found) for name, found in agreements.items() if found.rho]


def _verdict(label: str, found: Agreement) -> str:
    assert found.rho is not None
    rho, apart = found.rho, formatting.percent(found.apart or 0)
    fit = "fit to rank" if (found.apart or 0) >= 0.5 else "fit to rank all but close candidates"
    fit = fit if rho.rho >= FIT_TO_RANK else "not fit to rank"
    fit = fit if found.n >= FEW else "too few candidates to say whether it ranks"
    return (
        f"{label[0].upper()}{label[1:]}: the seeds agree on the order to ρ = {rho.rho:.2f} "
        f"[{rho.low:.2f}, {rho.high:.2f}] over {found.n} candidates, and {apart} of pairs differ by more than their "
        f"intervals: {fit}."
    )


def recommended(facts: StudyData) -> dict[str, Any]:
    base = next((c for c in facts.distinct if c.name == "base"), None)
    rows = [_beside(facts, name, base) for name in facts.measures if facts.amount(facts.best, name)]
    return {
        "title": title(facts.best),
        "id": facts.best.architecture.id,
        "number": facts.best.number,
        "reason": facts.reason[:1].upper() + facts.reason[1:] + ".",
        "words": architecture_text.describe(facts.best.architecture),
        "rows": rows,
        "compared": base is not None and base.number != facts.best.number,
    }


def _beside(facts: StudyData, name: str, base: Candidate | None) -> dict[str, str]:
    mine = facts.amount(facts.best, name)
    theirs = facts.amount(base, name) if base else None
    assert mine is not None
    row = {
        "label": facts.label(name),
        "mine": formatting.format_value(mine, name),
        "base": "–",
        "change": "",
        "verdict": "",
    }
    if theirs is None:
        return row
    row["base"] = formatting.format_value(theirs, name)
    if name in QUALITY_METRICS and mine.low <= theirs.high and theirs.low <= mine.high:
        return row | {"change": "within noise"}
    ratio = mine.value / theirs.value - 1 if theirs.value > 0 else math.nan
    if math.isfinite(ratio) and mine.value != theirs.value:
        row["change"] = f"{'+' if ratio > 0 else '−'}{abs(ratio):.1%}".replace("%", f"{formatting.GAP}%")
        row["verdict"] = "worse" if ratio > 0 else "better"
    return row


def reference(facts: StudyData) -> str:
    """The hypervolume's reference point, in words."""
    rows = [[facts.amount(c, n) for n in facts.objectives] for c in facts.scored if not diverged(c)]
    points = [tuple(i.value for i in row if i) for row in rows]
    worst = box(points)[1] if points else ()
    ends = [EffectInterval(value, value, value) for value in worst]
    return ", ".join(
        f"{facts.label(name)} {formatting.format_value(end, name)}"
        for name, end in zip(facts.objectives, ends, strict=False)
    )


def agreement_row(facts: StudyData, name: str, found: Agreement) -> dict[str, str]:
    rho = found.rho
    return {
        "name": name,
        "label": facts.label(name),
        "n": str(found.n),
        "rho": f"{rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}]" if rho else "cannot tell",
        "apart": formatting.percent(found.apart) if found.apart is not None else "–",
        "spread": f"{found.spread:.1f} ×" if found.spread is not None else "–",
        "drawn": "yes" if found.n > 1 else "",
    }


def sources(facts: StudyData) -> list[tuple[str, str]]:
    """Where each of the score's numbers comes from."""
    seeds = len(facts.seeds)
    rows = []
    for name in facts.measures:
        if name in QUALITY_METRICS:
            how = f"measured here: mean of {seeds} short runs under protocol {_hash(facts)}, with 95 % interval"
            how += ", the seeds' spread pooled over the study" if seeds > 1 else ""
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


def _hash(facts: StudyData) -> str:
    return next((c.score.quality.protocol_hash for c in facts.trained if c.score.quality), "")
