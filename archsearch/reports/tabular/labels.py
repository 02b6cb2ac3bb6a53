"""Display names of a table's numbers, and effects on them as text."""

from __future__ import annotations

import math

from archsearch.reports.rendering import formatting
from archsearch.score import OBJECTIVES
from archsearch.stats.estimate import Estimate
from archsearch.studies.tabular.effects import is_exact
from archsearch.studies.tabular.table import LOWER_IS_BETTER

FULL_SIZE = "full_size_"


def label(name: str) -> str:
    """Display name of a score, of one on a range of timesteps, of a cost, or of a latency.

    >>> label("validation_loss t1"), label("full_size_macs"), label("iphone-15-pro")
    ('validation loss t1', 'full-size MACs', 'iphone-15-pro')
    """
    if name.startswith(FULL_SIZE):
        return f"full-size {label(name.removeprefix(FULL_SIZE))}"
    metric, _, part = name.partition(" ")
    known = {**{key: each.label for key, each in OBJECTIVES.items()}, "retrieval_mrr": "retrieval (MRR)"}
    return f"{known.get(metric, metric)} {part}".rstrip()


def is_relative(name: str) -> bool:
    """Whether effects on a number are relative changes: those on costs and latencies, not those on scores."""
    return name not in LOWER_IS_BETTER


def effect(size: Estimate, name: str) -> Estimate:
    """An effect of `archsearch.studies.tabular.effects.effects_on`: one on a logarithm as a relative change."""
    if not is_relative(name):
        return size
    value, low, high = (round(math.expm1(end), 9) for end in (size.value, size.low, size.high))  # no change is 0
    return Estimate(value=value, low=low, high=high)


def effect_cell(size: Estimate, name: str) -> str:
    """An effect as text: with its interval, or on what is exact from its smallest to its largest size."""
    if is_exact(name):
        return formatting.format_span(effect(size, name))
    return formatting.format_change(effect(size, name), relative=is_relative(name))
