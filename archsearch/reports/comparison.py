"""Table of a comparison of recipes: the metrics of every variant, and its differences from the baseline."""

from __future__ import annotations

from typing import Literal

import pandas

from archsearch.reports.rendering import tables
from archsearch.stats import intervals
from archsearch.stats.estimate import Estimate
from archsearch.training.comparison import ComparisonConfig, Results

LABELS = {
    "validation_loss": "validation loss",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "retrieval_r1": "R@1",
    "retrieval_r10": "R@10",
    "retrieval_mrr": "MRR",
}
Verdict = Literal["better", "worse", "cannot tell", ""]


def mean_over_seeds(results: Results, metric: str) -> dict[str, Estimate]:
    """Mean of a metric over the seeds of every variant; intervals from the pooled interaction of variant and seed."""
    by_seed = {name: tuple(float(numbers[metric].value) for numbers in runs) for name, runs in results.items()}
    means = [Estimate(value=sum(v) / len(v), low=min(v), high=max(v), by_seed=v) for v in by_seed.values()]
    return dict(zip(results, intervals.pool_intervals(means), strict=True))


def difference(estimates: dict[str, Estimate], name: str, baseline: str) -> Estimate:
    """Difference of a variant from the baseline, paired by seed."""
    weights = [float(variant == name) - float(variant == baseline) for variant in estimates]
    return intervals.contrast(list(estimates.values()), weights)


def verdict(change: Estimate, better: Literal["lower", "higher"]) -> Verdict:
    """Verdict on a difference by its interval; ``better`` says which direction is an improvement."""
    if change.low <= 0 <= change.high:
        return "cannot tell"
    return "better" if (change.value < 0) == (better == "lower") else "worse"


def frame(comparison: ComparisonConfig, results: Results) -> pandas.DataFrame:
    """Data frame with one row per metric and variant."""
    rows = []
    for metric, better in comparison.metrics.items():
        estimates = mean_over_seeds(results, metric)
        for name, estimate in estimates.items():
            change = difference(estimates, name, comparison.baseline) if name != comparison.baseline else None
            rows.append(
                {
                    "variant": name,
                    "metric": metric,
                    "better": better,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    **{f"seed {s}": v for s, v in zip(comparison.seeds, estimate.by_seed, strict=True)},
                    "difference": None if change is None else change.value,
                    "difference low": None if change is None else change.low,
                    "difference high": None if change is None else change.high,
                    "verdict": "" if change is None else verdict(change, better),
                }
            )
    return pandas.DataFrame(rows)


def markdown(comparison: ComparisonConfig, results: Results) -> str:
    """Format the comparison as Markdown: one row per variant, each metric with its interval and verdict."""
    header = ["variant", *(f"{LABELS.get(m, m)} ({b} is better)" for m, b in comparison.metrics.items())]
    estimates = {metric: mean_over_seeds(results, metric) for metric in comparison.metrics}
    rows = []
    for name in comparison.variants:
        cells = [name]
        for metric, better in comparison.metrics.items():
            cell = _with_interval(estimates[metric][name])
            if name != comparison.baseline:
                change = difference(estimates[metric], name, comparison.baseline)
                cell += f"; {verdict(change, better)} ({_with_interval(change, signed=True)})"
            cells.append(cell)
        rows.append(cells)
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"Seeds {seeds}; means with 95 % intervals, pooled over variants. In parentheses after a verdict: the "
        f"difference from “{comparison.baseline}”, paired by seed, with its interval.\n\n"
        + tables.markdown(header, rows)
    )


def _with_interval(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (format(x, f"{sign}.3g") for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
