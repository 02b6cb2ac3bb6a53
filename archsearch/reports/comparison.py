"""A comparison of recipes as a table: every variant's numbers, and what can be told from the one compared with."""

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


def over_seeds(results: Results, metric: str) -> dict[str, Estimate]:
    """A metric of every variant, over its seeds; intervals by the pooled interaction of variant and seed."""
    by_seed = {name: tuple(float(numbers[metric].value) for numbers in runs) for name, runs in results.items()}
    plain = [Estimate(value=sum(v) / len(v), low=min(v), high=max(v), by_seed=v) for v in by_seed.values()]
    return dict(zip(results, intervals.pool_intervals(plain), strict=True))


def difference(found: dict[str, Estimate], name: str, against: str) -> Estimate:
    """A variant less the one compared with, over the same seeds."""
    weights = [float(other == name) - float(other == against) for other in found]
    return intervals.contrast(list(found.values()), weights)


def verdict(size: Estimate, better: Literal["lower", "higher"]) -> Verdict:
    """What a difference's interval allows to say."""
    if size.low <= 0 <= size.high:
        return "cannot tell"
    return "better" if (size.value < 0) == (better == "lower") else "worse"


def frame(comparison: ComparisonConfig, results: Results) -> pandas.DataFrame:
    """A row a variant and metric."""
    rows = []
    for metric, better in comparison.metrics.items():
        found = over_seeds(results, metric)
        for name, estimate in found.items():
            size = difference(found, name, comparison.against) if name != comparison.against else None
            rows.append(
                {
                    "variant": name,
                    "metric": metric,
                    "better": better,
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    **{f"seed {s}": v for s, v in zip(comparison.seeds, estimate.by_seed, strict=True)},
                    "difference": None if size is None else size.value,
                    "difference low": None if size is None else size.low,
                    "difference high": None if size is None else size.high,
                    "verdict": "" if size is None else verdict(size, better),
                }
            )
    return pandas.DataFrame(rows)


def markdown(comparison: ComparisonConfig, results: Results) -> str:
    """A row a variant: each metric with its interval, and the verdict against the one compared with."""
    header = ["variant", *(f"{LABELS.get(m, m)} ({b} is better)" for m, b in comparison.metrics.items())]
    estimates = {metric: over_seeds(results, metric) for metric in comparison.metrics}
    rows = []
    for name in comparison.variants:
        cells = [name]
        for metric, better in comparison.metrics.items():
            found = estimates[metric]
            cell = _amount(found[name])
            if name != comparison.against:
                size = difference(found, name, comparison.against)
                cell += f"; {verdict(size, better)} ({_amount(size, signed=True)})"
            cells.append(cell)
        rows.append(cells)
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"Seeds {seeds}; means with 95 % intervals, pooled over variants. In brackets after a verdict: the difference "
        f"from “{comparison.against}”, over the same seeds, with its interval.\n\n" + tables.markdown(header, rows)
    )


def _amount(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (format(x, f"{sign}.3g") for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
