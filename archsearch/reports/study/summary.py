"""Texts of a study's page: headline, recommendation, warnings, reliability of the scores, sources of the numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from archsearch.reports.rendering import architecture_text, formatting
from archsearch.reports.study.data import StudyData, diverged, estimates, title
from archsearch.reports.study.seed_agreement import Agreement, seed_agreement
from archsearch.score import QUALITY_METRICS, interval_name
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import are_apart
from archsearch.stats.pareto import bounds
from archsearch.studies.storage.record import Candidate
from snapgen.progress import format_duration

MIN_RANK_CORRELATION = 0.7
"""Rank correlation between seeds below which the page calls a score unreliable for ranking."""

MIN_CANDIDATES = 10
"""Number of candidates below which the page calls the front preliminary and gives no verdict on the score."""


def headline(study: StudyData) -> str:
    """The search space, its size, and the objectives, in two sentences."""
    space = study.attrs["space"]
    size = math.prod(len(f.choices) for f in study.factors)
    objectives = " and ".join(study.label(name) for name in study.objectives)
    records = {c.score.latency.device: c.score.latency.source for c in study.scored if c.score.latency}
    sources = ", ".join(f"{source} on {device}" for device, source in records.items())
    devices = f" ({sources}: {study.timed_pass.text})" if records else ""
    knobs = f"{len(study.factors)} knobs, {size:,} combinations"
    return f"Space {space['name']}: {knobs}. Minimized: {objectives}{devices}."


def tiles(study: StudyData) -> list[tuple[str, str]]:
    """Counts of candidates by state and the total working time, as pairs of value and caption."""
    counts = Counter(c.state for c in study.candidates)
    infeasible = counts["infeasible"] + sum(c.state == "scored" and c.infeasible is not None for c in study.candidates)
    reused = sum(c.is_reused for c in study.candidates)
    seconds = sum(c.seconds for c in study.candidates)
    tiles = [(f"{len(study.scored)}", "scored"), (f"{len(study.front)}", "on the front")]
    tiles += [(f"{infeasible}", "infeasible"), (f"{reused}", "reused")]
    tiles += [(f"{counts['paused']}", "pruned at a rung")] if counts["paused"] else []
    tiles += [(f"{counts[state]}", state) for state in ("failed", "running") if counts[state]]
    return [*tiles, (format_duration(seconds), "working time")] if seconds >= 1 else tiles


def agreements_of(study: StudyData) -> dict[str, Agreement]:
    """Reliability of each quality metric that the scored candidates have."""
    names = [n for n in study.measures if n in QUALITY_METRICS]
    return {name: seed_agreement([e for _, e in estimates(study, name)]) for name in names}


def warnings(study: StudyData, agreements: Mapping[str, Agreement]) -> list[str]:
    """Warnings at the top of the page, on latencies, reliability of the scores, and trials, in this order."""
    lines = _latency_warnings(study)
    for name in study.objectives:
        if name in agreements:
            lines += _agreement_warnings(study.label(name), agreements[name], len(study.seeds))
    if len(study.scored) < MIN_CANDIDATES:
        lines.append(f"Only {_count_with_verb(len(study.scored))} scored: the front is preliminary.")
    return lines + _trial_warnings(study)


def _latency_warnings(study: StudyData) -> list[str]:
    records = [c.score.latency for c in study.scored if c.score.latency]
    lines = [study.timed_pass.mismatch] if study.timed_pass.mismatch and study.trained else []
    conditions = {record.conditions for record in records}
    if len(conditions) > 1:
        lines.append(
            f"Latencies were measured under {len(conditions)} different conditions (see Sources): not comparable."
        )
    unsteady = sum(not record.steady for record in records)
    if unsteady:
        lines.append(f"{unsteady} of {len(records)} latencies did not reach a steady state within the time limit.")
    return lines


def _agreement_warnings(label: str, agreement: Agreement, seeds: int) -> list[str]:
    lines = []
    if seeds < 2:
        lines.append(f"With a single seed, the reproducibility of {label} is unknown.")
    elif agreement.rho is None:
        lines.append(f"The reproducibility of {label} cannot be estimated from {count_candidates(agreement.n)}.")
    elif agreement.rho.value < MIN_RANK_CORRELATION:
        rho = f"ρ = {agreement.rho.value:.2f} (n = {agreement.n})"
        lines.append(f"Rankings by {label} agree poorly between two seeds, {rho}: do not rank candidates by it.")
    if agreement.separable is not None and agreement.separable < 0.5:
        share = formatting.percent(agreement.separable)
        lines.append(f"Only {share} of the pairs of candidates have non-overlapping intervals of {label}.")
    return lines


def _trial_warnings(study: StudyData) -> list[str]:
    lines = []
    diverged_count = sum(diverged(c) for c in study.candidates)
    if diverged_count:
        lines.append(f"Training diverged for {count_candidates(diverged_count)}, which the charts leave out.")
    failed = [c for c in study.candidates if c.state == "failed"]
    if failed:
        cause = f": {failed[0].error}" if failed[0].error else ""
        lines.append(f"{count_candidates(len(failed))} failed; the first is trial {failed[0].number}{cause}.")
    running = sum(c.state == "running" for c in study.candidates)
    if running:
        lines.append(f"The study has not finished: {_count_with_verb(running)} running.")
    return lines


def count_candidates(number: int) -> str:
    """A number of candidates, in words."""
    return f"{number} candidate{'' if number == 1 else 's'}"


def _count_with_verb(number: int) -> str:
    return f"{count_candidates(number)} {'is' if number == 1 else 'are'}"


def verdicts(study: StudyData, agreements: Mapping[str, Agreement]) -> list[str]:
    """One sentence for each quality metric: whether its ranking is reproducible and resolves the candidates."""
    return [_verdict(study.label(name), agreement) for name, agreement in agreements.items() if agreement.rho]


def _verdict(label: str, agreement: Agreement) -> str:
    assert agreement.rho is not None
    rho, separable = agreement.rho, formatting.percent(agreement.separable or 0)
    if agreement.n < MIN_CANDIDATES:
        conclusion = "too few candidates to judge the ranking"
    elif rho.value < MIN_RANK_CORRELATION:
        conclusion = "not reliable for ranking"
    elif (agreement.separable or 0) < 0.5:
        conclusion = "reliable for ranking, except between close candidates"
    else:
        conclusion = "reliable for ranking"
    return (
        f"{label[0].upper()}{label[1:]}: the rank correlation between seeds is ρ = {rho:.2f} over {agreement.n} "
        f"candidates, and {separable} of the pairs have non-overlapping intervals: {conclusion}."
    )


def recommended(study: StudyData) -> dict[str, Any]:
    """The recommended candidate: its title, description, reason, and its numbers next to those of the base."""
    base = next((c for c in study.distinct if c.name == "base"), None)
    rows = [_compared_with_base(study, name, base) for name in study.measures if study.value_of(study.best, name)]
    return {
        "title": title(study.best),
        "id": study.best.architecture.id,
        "number": study.best.number,
        "reason": study.reason[:1].upper() + study.reason[1:] + ".",
        "description": architecture_text.describe(study.best.architecture),
        "rows": rows,
        "compared": base is not None and base.number != study.best.number,
    }


def _compared_with_base(study: StudyData, name: str, base: Candidate | None) -> dict[str, str]:
    best_value = study.value_of(study.best, name)
    base_value = study.value_of(base, name) if base else None
    assert best_value is not None
    row = {
        "label": study.label(name),
        "interval": interval_name(name, study.latencies),
        "value": formatting.format_value(best_value, name),
        "ends": formatting.format_ends(best_value),
        "base": "–",
        "base_ends": "",
        "change": "",
        "verdict": "",
    }
    if base_value is None:
        return row
    row |= {"base": formatting.format_value(base_value, name), "base_ends": formatting.format_ends(base_value)}
    is_apart = are_apart(best_value, base_value)
    if name in QUALITY_METRICS and not is_apart:
        return row | {"change": "within noise"}
    ratio = best_value.value / base_value.value - 1 if base_value.value > 0 else math.nan
    if math.isfinite(ratio) and best_value.value != base_value.value:
        row["change"] = f"{'+' if ratio > 0 else '−'}{abs(ratio):.1%}".replace("%", f"{formatting.NBSP}%")
        row["verdict"] = "" if not is_apart else "worse" if ratio > 0 else "better"
    return row


def reference(study: StudyData) -> str:
    """Reference point of the hypervolume as text: the worst value of each objective."""
    rows = [[study.value_of(c, n) for n in study.objectives] for c in study.scored if not diverged(c)]
    points = [tuple(i.value for i in row if i) for row in rows]
    worst = bounds(points)[1] if points else ()
    return ", ".join(
        f"{study.label(name)} {formatting.format_value(Estimate.exact(value), name)}"
        for name, value in zip(study.objectives, worst, strict=False)
    )


def agreement_row(study: StudyData, name: str, agreement: Agreement) -> dict[str, str]:
    """Row of the table of reliability for one quality metric."""
    rho = agreement.rho
    return {
        "name": name,
        "label": study.label(name),
        "n": str(agreement.n),
        "rho": f"{rho:.2f}" if rho else "cannot tell",
        "separable": formatting.percent(agreement.separable) if agreement.separable is not None else "–",
        "spread": f"{agreement.spread:.1f} ×" if agreement.spread is not None else "–",
        "drawn": "yes" if agreement.n > 1 else "",
    }


def runs_in_words(study: StudyData) -> str:
    """How many training runs the candidates had, in words."""
    counts = Counter(c.runs for c in study.trained)
    if len(counts) < 2:
        return f"every candidate was trained with {' or '.join(map(_seeds, counts)) or 'no seed'}"
    parts = [f"{count_candidates(number)} with {_seeds(seeds)}" for seeds, number in sorted(counts.items())]
    return f"{', '.join(parts)}: those that may be on the front have more"


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def sources(study: StudyData) -> list[tuple[str, str]]:
    """How each number of the score was obtained, as pairs of its name and a description."""
    protocol_hash = next((c.score.quality.protocol_hash for c in study.trained if c.score.quality), "")
    rows = []
    for name in study.measures:
        if name in QUALITY_METRICS:
            how = f"measured by short training runs ({runs_in_words(study)}), protocol {protocol_hash}, 95 % interval"
            if any(c.runs > 1 for c in study.trained):
                how += " from the spread of seeds pooled over the study"
            rows.append((study.label(name), how))
        elif name != "latency_ms":
            rows.append((study.label(name), "computed exactly from the architecture"))
    records = [c.score.latency for c in study.distinct if c.score.latency]
    for conditions, count in Counter(record.conditions for record in records).items():
        source, device, units, chip, threads, runtime = conditions
        runs = [r.runs for r in records if r.conditions == conditions]
        span = f"{min(runs)}–{max(runs)}" if min(runs) < max(runs) else str(min(runs))
        how = f"{source} on {device} ({units}), {chip}, {runtime}: {count} candidates, "
        if source == "predicted":
            how += "each with its 90 % interval"
        else:
            how += f"median and quartiles of {span} runs each, {threads} thread(s)"
        rows.append((study.label("latency_ms"), how))
    best = study.best.score.latency
    if best:
        image = study.timed_pass.image(best.median_ms)
        of_image = f"; of the recommended candidate, {image}" if image else ""
        rows.append(("a latency is of", study.timed_pass.text + of_image))
    return rows
