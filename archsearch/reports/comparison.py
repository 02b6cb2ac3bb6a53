"""Table of a comparison of recipes: the metrics of every variant, and its differences from the baseline."""

from __future__ import annotations

from collections.abc import Iterator

import pandas

from archsearch.reports.rendering import tables
from archsearch.stats import contrasts, intervals
from archsearch.stats.contrasts import SeedTable
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


def seed_tables(comparison: ComparisonConfig, results: Results) -> dict[str, SeedTable]:
    """The variants' values of each metric by seed; variants that evaluate the same net count as one net."""
    nets = comparison.nets
    return {metric: SeedTable(_estimates(results, metric), nets) for metric in comparison.metrics}


def _estimates(results: Results, metric: str) -> dict[str, Estimate]:
    by_seed = {name: tuple(float(numbers[metric].value) for numbers in runs) for name, runs in results.items()}
    return {name: Estimate(value=sum(v) / len(v), low=min(v), high=max(v), by_seed=v) for name, v in by_seed.items()}


def frame(comparison: ComparisonConfig, results: Results) -> pandas.DataFrame:
    """Data frame with one row per metric, variant and baseline that the variant is compared with."""
    rows = []
    for metric, table in seed_tables(comparison, results).items():
        better = comparison.metrics[metric]
        for name, baseline in _pairs(comparison):
            mean = table.mean(name)
            change = table.difference(name, baseline) if baseline else None
            rows.append(
                {
                    "variant": name,
                    "metric": metric,
                    "better": better,
                    "value": mean.value,
                    "low": mean.low,
                    "high": mean.high,
                    **{f"seed {s}": v for s, v in zip(comparison.seeds, mean.by_seed, strict=True)},
                    "baseline": baseline,
                    "difference": None if change is None else change.value,
                    "difference low": None if change is None else change.low,
                    "difference high": None if change is None else change.high,
                    "verdict": "" if change is None else intervals.verdict(change, better),
                }
            )
    return pandas.DataFrame(rows)


def markdown(comparison: ComparisonConfig, results: Results) -> str:
    """Format the comparison as Markdown: one row per variant, each metric with its interval and verdict, and notes."""
    header = ["variant", *(f"{LABELS.get(m, m)} ({b} is better)" for m, b in comparison.metrics.items())]
    all_tables = seed_tables(comparison, results)
    rows = []
    for name in comparison.variants:
        cells = [name]
        for metric, seed_table in all_tables.items():
            cells.append("; ".join([f"{seed_table.mean(name):.3g}", *_verdicts(comparison, name, metric, seed_table)]))
        rows.append(cells)
    table = tables.markdown(header, rows).rstrip()
    notes = (_at_once(comparison, all_tables), _uneven(all_tables))
    return "\n\n".join(part for part in (_legend(comparison), table, *notes) if part) + "\n"


def _pairs(comparison: ComparisonConfig) -> list[tuple[str, str]]:
    """Each variant with each of its baselines, or with an empty name if it has none."""
    return [(name, baseline) for name in comparison.variants for baseline in comparison.baselines_of(name) or ("",)]


def _verdicts(comparison: ComparisonConfig, name: str, metric: str, table: SeedTable) -> Iterator[str]:
    """The verdict on a variant against each of its baselines, which are named where they are its own."""
    for baseline in comparison.baselines_of(name):
        change = table.difference(name, baseline)
        told = f"{intervals.verdict(change, comparison.metrics[metric])} ({change:+.3g})"
        yield told if comparison.variants[name].baselines is None else f"vs {baseline}: {told}"


def _legend(comparison: ComparisonConfig) -> str:
    nets = len(set(comparison.nets.values()))
    pooled = "pooled over variants"
    if nets < len(comparison.variants):
        pooled = f"pooled over the {nets} nets that the {len(comparison.variants)} variants evaluate"
    own = any(variant.baselines for variant in comparison.variants.values())
    return (
        f"Seeds {', '.join(map(str, comparison.seeds))}; means with 95 % intervals [a, b], {pooled}. In parentheses "
        f"after a verdict: the difference from “{comparison.baseline}”{' or the row after “vs”' if own else ''}, "
        "paired by seed, with its interval."
    )


def _at_once(comparison: ComparisonConfig, all_tables: dict[str, SeedTable]) -> str:
    """Which verdicts hold for all of them at once."""
    pairs = [(name, baseline) for name, baseline in _pairs(comparison) if baseline]
    confidence = contrasts.at_once(len(pairs) * len(all_tables))
    holding = []
    for metric, table in all_tables.items():
        names = [
            name if comparison.variants[name].baselines is None else f"{name} vs {baseline}"
            for name, baseline in pairs
            if intervals.verdict(table.difference(name, baseline, confidence=confidence)) != "cannot tell"
        ]
        if names:
            holding.append(f"{', '.join(names)} ({LABELS.get(metric, metric)})")
    return (
        f"Each verdict is taken alone: of those without an effect, about one in twenty is “better” or “worse”. Of the "
        f"{len(pairs) * len(all_tables)} together, these hold at once (Bonferroni): {'; '.join(holding) or 'none'}."
    )


def _uneven(all_tables: dict[str, SeedTable]) -> str:
    """Which variants may differ more between seeds than the others, so that the pooled interval may not be theirs."""
    uneven = [f"{', '.join(t.uneven)} ({LABELS.get(m, m)})" for m, t in all_tables.items() if t.uneven]
    if not uneven:
        return ""
    return (
        "These differ more between seeds than one in ten would by chance, so that their intervals are those of their "
        f"own spread where these are wider: {'; '.join(uneven)}."
    )
