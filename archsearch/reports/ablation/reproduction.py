"""What an ablation reproduced of the published one and what not, in sentences; and where each number comes from."""

from __future__ import annotations

from collections.abc import Mapping

from archsearch.score import metric_label
from archsearch.studies.config.ablation import Quantity
from archsearch.studies.experiments.ablation_results import Ablation, RowResult

WITHIN = 1.0
"""Percentage points within which a change of params or MACs counts as reproduced."""

_COUNTED: Mapping[Quantity, str] = {"params": "params", "macs": "MACs"}


def sentences(ablation: Ablation) -> list[str]:
    """What was reproduced and what was not; a sentence for each kind of number."""
    told = [_unfinished(ablation)] if any(r.score is None for r in ablation.results) else []
    counted = [_counted(ablation, name) for name in _COUNTED]
    of_another_size = ablation.ablation.published_from is not None
    others = [_latency(ablation), _quality(ablation)]
    # What the study is about comes first: counts where they are to be reproduced, else quality.
    told += [*reversed(others), *counted] if of_another_size else [*counted, *others]
    return [line for line in told if line]


def _unfinished(ablation: Ablation) -> str:
    missing = [f"{r.planned.name} ({r.error})" for r in ablation.results if r.score is None]
    return f"Not finished: {', '.join(missing)}."


def _counted(ablation: Ablation, name: Quantity) -> str:
    points = {r.planned.name: p for r in ablation.results if (p := r.apart(name)) is not None}
    if not points:
        return ""
    if ablation.ablation.published_from is not None:
        return _of_another_size(points, _COUNTED[name])
    missed = [f"row {row} ({value:+.1f})".replace("-", "−") for row, value in points.items() if abs(value) > WITHIN]
    what = f"{len(points) - len(missed)} of {len(points)} published changes of {_COUNTED[name]}"
    most = max(map(abs, points.values()))
    end = f"not reproduced, in points: {', '.join(missed)}" if missed else f"the largest difference is {most:.1f}"
    return f"Reproduced within {WITHIN:g} point: {what}; {end}."


def _of_another_size(points: Mapping[str, float], what: str) -> str:
    told = ", ".join(f"row {row} {value:+.0f}" for row, value in points.items()).replace("-", "−")
    return (
        f"The published nets have another size, so their changes of {what} are not expected here; apart: {told} points."
    )


def _latency(ablation: Ablation) -> str:
    pairs = [
        (r, r.changes["latency_ms"], published.value)
        for r in ablation.results
        if (published := r.planned.published.get("latency_ms")) and published.value and "latency_ms" in r.changes
    ]
    if not pairs:
        return ""
    alike = [r.planned.name for r, ours, theirs in pairs if (ours < 0) == (theirs < 0)]
    other = [r.planned.name for r, *_ in pairs if r.planned.name not in alike]
    told = "; ".join(f"row {r.planned.name} {ours:+.0f} % against {theirs:+.0f} %" for r, ours, theirs in pairs)
    same = f"the sign is the same in {len(alike)} of {len(pairs)}{', not in row ' if other else ''}{', '.join(other)}"
    text = f"Latency is of another device than the published, so no reproduction of it: {same} ({told})."
    return text.replace("-", "−")


def _quality(ablation: Ablation) -> str:
    if not ablation.metrics:
        return "Quality was not taken: nothing was trained, and no published FID is reproduced."
    metric = next((n for n in ablation.settings.objectives if n in ablation.metrics), ablation.metrics[0])
    label = metric_label(metric, ablation.extractor)
    seeds = len(ablation.settings.protocol.seeds)
    ladder = [r for r in ablation.results if metric in r.effects and r.planned.group == "ladder"]
    certain = [r for r in ladder if r.effects[metric].verdict != "cannot tell"]
    told = f"Quality is the {label} of short runs, not the published FID: with {seeds} seeds {len(certain)} of "
    told += f"{len(ladder)} rows of the ladder can be told from the row they change"
    directions = {r.planned.name: (d, r.effects[metric].verdict) for r in ladder if (d := direction(ablation, r))}
    if not directions:
        return told + "."
    alike = [name for name, (theirs, ours) in directions.items() if theirs == ours]
    against = [name for name, (theirs, ours) in directions.items() if ours not in (theirs, "cannot tell")]
    told += f"; of {len(directions)} published directions the same: {', '.join(alike) or 'none'}"
    return f"{told}, the opposite: {', '.join(against) or 'none'}, the others cannot be told."


def direction(ablation: Ablation, r: RowResult) -> str | None:
    """Whether the published FID got better or worse with a row, where the paper says so."""
    mine = r.planned.published.get("frechet_distance")
    if mine is None or r.planned.over is None:
        return None
    below = ablation.result(r.planned.over).planned.published.get("frechet_distance")
    if mine.value is not None and below is not None and below.value is not None:
        return "better" if mine.value < below.value else "worse"
    return mine.says if mine.says in ("better", "worse") else None


def sources(ablation: Ablation) -> list[tuple[str, str]]:
    """Each kind of number, and how it was come by."""
    space = ablation.attrs["space"]
    grid = f"{space['latent_size']} × {space['latent_size']}"
    found = [("params, MACs", f"counted, attention included, at a latent of {grid}, batch 1")]
    records = [r.score.latency for r in ablation.results if r.score and r.score.latency]
    if records:
        one = records[0]
        threads = f", {one.threads} thread" + ("s" if one.threads != 1 else "") if one.threads else ""
        unsteady = sum(not record.steady for record in records)
        found.append(
            (
                "latency",
                f"{one.source} on {one.device}: {one.chip}{threads}, {one.runtime}; median and quartiles"
                + (
                    "; all rows in turn until two medians agree, the lower counts"
                    if "latencies" in ablation.attrs
                    else ""
                )
                + (f"; {unsteady} of {len(records)} did not settle in the time given" if unsteady else ""),
            )
        )
    if ablation.metrics:
        p = ablation.settings.protocol
        found.append(
            (
                "quality",
                f"short runs of {p.steps} steps, batch {p.batch}, {p.resolution} px of {p.data}, seeds "
                f"{', '.join(map(str, p.seeds))}, protocol {ablation.attrs['protocol_hash']}; 95 % intervals from the "
                "interaction of rows and seeds, pooled over all rows; each verdict is at 95 % for itself, so of twenty "
                "that should say cannot tell one may not",
            )
        )
    published = ablation.ablation
    if published.published_source:
        found.append(("published", f"{published.published_source}; {published.published_protocol}".rstrip("; ")))
    return found
