"""Reliability of a score: rank agreement between seeds, and differences between candidates relative to the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import are_apart
from archsearch.stats.rank_correlation import spearman


@dataclass(frozen=True)
class Agreement:
    """Reliability of one metric.

    Attributes:
        n: number of candidates with two seeds or more.
        rho: Spearman's rank correlation between the first two seeds, over the candidates; None where it is undefined
            (`archsearch.stats.rank_correlation.spearman`).
        separable: fraction of pairs of candidates whose 95 % intervals do not overlap; None for a single candidate.
        spread: standard deviation between candidates over the median half-width of their intervals; None if undefined.
    """

    n: int
    rho: Estimate | None
    separable: float | None
    spread: float | None


def seed_agreement(estimates: Sequence[Estimate]) -> Agreement:
    """Compute the reliability of one metric from the estimates of all scored candidates."""
    pairs = [e.by_seed[:2] for e in estimates if len(e.by_seed) > 1]
    first, second = [p[0] for p in pairs], [p[1] for p in pairs]
    return Agreement(len(pairs), spearman(first, second), _separable_fraction(estimates), _spread(estimates))


def _separable_fraction(estimates: Sequence[Estimate]) -> float | None:
    pairs = [(a, b) for i, a in enumerate(estimates) for b in estimates[:i]]
    if not pairs:
        return None
    return sum(are_apart(a, b) for a, b in pairs) / len(pairs)


def _spread(estimates: Sequence[Estimate]) -> float | None:
    half_width = float(np.median([(e.high - e.low) / 2 for e in estimates])) if estimates else 0.0
    if len(estimates) < 2 or half_width == 0:
        return None
    return float(np.std([e.value for e in estimates], ddof=1)) / half_width
