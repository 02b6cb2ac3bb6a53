"""Sentences on which published results an ablation reproduces, and on how its numbers were obtained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archsearch.latency.timed_pass import TimedPass
from archsearch.score import metric_label
from archsearch.studies.config.ablation import Quantity
from archsearch.studies.experiments.ablation_results import Ablation, RowResult

TOLERANCE_POINTS = 1.0
"""Difference in percentage points up to which a change of params or MACs counts as reproduced."""

_COUNTED: Mapping[Quantity, str] = {"params": "params", "macs": "MACs"}


def sentences(ablation: Ablation) -> list[str]:
    """One sentence per kind of number on whether it reproduces the published one; the main result first."""
    missing = [f"{r.planned.name} ({r.error})" for r in ablation.results if r.score is None]
    lines = [f"Not finished: {', '.join(missing)}."] if missing else []
    counted = [_counted(ablation, name) for name in _COUNTED]
    of_another_size = ablation.ablation.published_from is not None
    others = [_latency(ablation), _quality(ablation)]
    # The counts can only be reproduced at the published size; at another size, quality is the main result.
    lines += [*reversed(others), *counted] if of_another_size else [*counted, *others]
    return [line for line in lines if line]


def _counted(ablation: Ablation, name: Quantity) -> str:
    points = {r.planned.name: p for r in ablation.results if (p := r.apart(name)) is not None}
    if not points:
        return ""
    if ablation.ablation.published_from is not None:
        return _of_another_size(points, _COUNTED[name])
    outside = [
        f"row {row} ({value:+.1f})".replace("-", "−") for row, value in points.items() if abs(value) > TOLERANCE_POINTS
    ]
    count = f"{len(points) - len(outside)} of {len(points)} published changes of {_COUNTED[name]}"
    largest = max(map(abs, points.values()))
    details = (
        f"not reproduced (points): {', '.join(outside)}" if outside else f"the largest difference is {largest:.1f}"
    )
    return f"Reproduced within {TOLERANCE_POINTS:g} percentage point: {count}; {details}."


def _of_another_size(points: Mapping[str, float], label: str) -> str:
    differences = ", ".join(f"row {row} {value:+.0f}" for row, value in points.items()).replace("-", "−")
    return (
        f"The published networks have another size, so their changes of {label} are not expected here; differences in "
        f"percentage points: {differences}."
    )


def _latency(ablation: Ablation) -> str:
    pairs = [
        (r, r.changes["latency_ms"], published.value)
        for r in ablation.results
        if (published := r.planned.published.get("latency_ms")) and published.value and "latency_ms" in r.changes
    ]
    if not pairs:
        return ""
    record = next(iter(ablation.latencies))
    fitted = [pair for pair in pairs if pair[0].is_latency_fitted]
    pairs = [pair for pair in pairs if not pair[0].is_latency_fitted]
    text = "" if record.source == "measured" else f"Latency is {record.source} for {record.device}. "
    if fitted:
        text += (
            "The prediction was fitted to these published changes, which therefore do not count as reproduced: "
            f"{_changes(fitted)}. "
        )
    if not pairs:
        return text.strip()
    same = [r.planned.name for r, ours, published in pairs if (ours < 0) == (published < 0)]
    opposite = [r.planned.name for r, *_ in pairs if r.planned.name not in same]
    exceptions = f", except in row {', '.join(opposite)}" if opposite else ""
    if record.source == "measured":
        text += "Latency was measured on another device than the published one, so only its direction is compared: "
    else:
        text += "Of the others only the direction is compared: " if fitted else "Only its direction is compared: "
    text += f"the change has the same sign in {len(same)} of {len(pairs)} rows{exceptions} ({_changes(pairs)})."
    return text


def _changes(pairs: Sequence[tuple[RowResult, float, float]]) -> str:
    """Changes of rows beside the published ones, in percent."""
    changes = (f"row {r.planned.name} {ours:+.0f} %, published {value:+.0f} %" for r, ours, value in pairs)
    return "; ".join(changes).replace("-", "−")


def _quality(ablation: Ablation) -> str:
    if not ablation.metrics:
        return "Quality was not measured: nothing was trained, so no published FID is reproduced."
    metric = next((n for n in ablation.settings.objectives if n in ablation.metrics), ablation.metrics[0])
    label = metric_label(metric, ablation.extractor)
    seeds = len(ablation.settings.protocol.train_seeds)
    ladder = [r for r in ablation.results if metric in r.effects and r.planned.group == "ladder"]
    significant = [r for r in ladder if r.effects[metric].verdict != "cannot tell"]
    text = f"Quality is the {label} of short training runs, not the published FID: with {seeds} seeds "
    text += f"{len(significant)} of {len(ladder)} rows of the ladder differ significantly from their baseline row"
    directions = {r.planned.name: (d, r.effects[metric].verdict) for r in ladder if (d := direction(ablation, r))}
    if not directions:
        return text + "."
    same = [name for name, (published, ours) in directions.items() if published == ours]
    opposite = [name for name, (published, ours) in directions.items() if ours not in (published, "cannot tell")]
    text += f"; of {len(directions)} published directions, the same: {', '.join(same) or 'none'}"
    return f"{text}; the opposite: {', '.join(opposite) or 'none'}; the others are not significant."


def direction(ablation: Ablation, r: RowResult) -> str | None:
    """Whether the published FID gets better or worse with a row; None if the paper does not say."""
    fid = r.planned.published.get("frechet_distance")
    if fid is None or r.planned.baseline is None:
        return None
    baseline_fid = ablation.result(r.planned.baseline).planned.published.get("frechet_distance")
    if fid.value is not None and baseline_fid is not None and baseline_fid.value is not None:
        return "better" if fid.value < baseline_fid.value else "worse"
    return fid.quote if fid.quote in ("better", "worse") else None


def sources(ablation: Ablation) -> list[tuple[str, str]]:
    """How each kind of number was obtained, as pairs of its name and a description."""
    timed_pass = TimedPass.of_study(ablation.attrs)
    rows = [("params, MACs", f"computed exactly, including attention, of {timed_pass.text}")]
    if ablation.latencies:
        rows.append(("latency", f"of {timed_pass.text}; {_latency_source(ablation)}"))
    if ablation.metrics:
        rows.append(("quality", _quality_source(ablation)))
    if ablation.metrics and timed_pass.mismatch:
        rows.append(("quality and latency", timed_pass.mismatch))
    published = ablation.ablation
    if published.published_source:
        rows.append(("published", f"{published.published_source}; {published.published_protocol}".rstrip("; ")))
    return rows


def _latency_source(ablation: Ablation) -> str:
    records = ablation.latencies
    first = records[0]
    threads = f", {first.threads} thread" + ("s" if first.threads != 1 else "") if first.threads else ""
    text = f"{first.source} on {first.device}: {first.chip}{threads}, {first.runtime}; median and {first.interval_name}"
    if "latencies" in ablation.attrs:
        text += "; all rows are measured round-robin until two medians agree, and the lower one is used"
    unsteady = sum(not record.steady for record in records)
    if unsteady:
        text += f"; {unsteady} of {len(records)} did not reach a steady state within the time limit"
    return text


def _quality_source(ablation: Ablation) -> str:
    p = ablation.settings.protocol
    return (
        f"short training runs of {p.steps} steps, batch size {p.batch_size}, {p.resolution} px of {p.data}, "
        f"seeds {', '.join(map(str, p.train_seeds))}, protocol {ablation.attrs['protocol_hash']}; 95 % intervals from "
        "the interaction of rows and seeds, pooled over all rows, and wider for rows that differ more between seeds "
        "than one in ten would by chance; verdicts are not corrected for multiple comparisons, so about one in twenty "
        f"rows without an effect gets a verdict; {_at_once(ablation)}"
    )


def _at_once(ablation: Ablation) -> str:
    """Which verdicts hold for all rows and quality numbers at once."""
    holding = []
    for metric in ablation.metrics:
        rows = [r.planned.name for r in ablation.results if metric in r.effects and r.effects[metric].holds_at_once]
        if rows:
            holding.append(f"{', '.join(rows)} ({metric_label(metric, ablation.extractor)})")
    return f"these hold for all comparisons at once (Bonferroni): {'; '.join(holding) or 'none'}"
