"""Table of a comparison of recipes: the metrics of every variant, and its differences from the baseline."""

from __future__ import annotations

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


def mean_over_seeds(results: Results, metric: str) -> dict[str, Estimate]:
    """Mean of a metric over the seeds of every variant; intervals from the pooled interaction of variant and seed."""
    by_seed = {name: tuple(float(numbers[metric].value) for numbers in runs) for name, runs in results.items()}
    means = [Estimate(value=sum(v) / len(v), low=min(v), high=max(v), by_seed=v) for v in by_seed.values()]
    return dict(zip(results, intervals.pool_intervals(means), strict=True))


def frame(comparison: ComparisonConfig, results: Results) -> pandas.DataFrame:
    """Data frame with one row per metric and variant."""
    rows = []
    for metric, better in comparison.metrics.items():
        estimates = mean_over_seeds(results, metric)
        for name, estimate in estimates.items():
            change = intervals.difference(estimates, name, comparison.baseline) if name != comparison.baseline else None
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
                    "verdict": "" if change is None else intervals.verdict(change, better),
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
            cell = f"{estimates[metric][name]:.3g}"
            if name != comparison.baseline:
                change = intervals.difference(estimates[metric], name, comparison.baseline)
                cell += f"; {intervals.verdict(change, better)} ({change:+.3g})"
            cells.append(cell)
        rows.append(cells)
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"Seeds {seeds}; means with 95 % intervals, pooled over variants. In parentheses after a verdict: the "
        f"difference from “{comparison.baseline}”, paired by seed, with its interval.\n\n"
        + tables.markdown(header, rows)
    )
