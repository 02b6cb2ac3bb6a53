"""Whether a score means anything: agreement between its seeds, and differences between candidates beside its noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archsearch.score import Estimate
from reports.effects import Array, Interval
from snapgen.seeds import derive

RESAMPLES = 2000

FEWEST = 4
"""Candidates under which a rank correlation says nothing."""


@dataclass(frozen=True)
class Agreement:
    """How well one metric repeats.

    Attributes:
        n: candidates with two seeds or more.
        rho: Spearman's rank correlation between the first two seeds, over the candidates; None under `FEWEST`.
        apart: share of pairs of candidates whose 95 % intervals do not overlap; None for a single candidate.
        spread: standard deviation between candidates over the median half-width of their intervals.
    """

    n: int
    rho: Interval | None
    apart: float | None
    spread: float | None


def agreement(estimates: Sequence[Estimate]) -> Agreement:
    """Of one metric, over all scored candidates."""
    pairs = [e.by_seed[:2] for e in estimates if len(e.by_seed) > 1]
    first, second = [p[0] for p in pairs], [p[1] for p in pairs]
    return Agreement(len(pairs), spearman(first, second), _apart(estimates), _spread(estimates))


def spearman(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Rank correlation with a percentile bootstrap interval over the pairs; None if there are too few or all tie."""
    if len(a) < FEWEST or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    pairs = np.array([a, b], dtype=np.float64)
    rng = np.random.default_rng(derive(0, "agreement"))
    again = rng.integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.nanquantile(_rho(pairs[:, again]), (0.025, 0.975))
    return Interval(float(_rho(pairs)), float(low), float(high))


def _rho(pairs: Array) -> Array:
    """(2, ..., n) to (...); NaN where all of one side tie."""
    from scipy.stats import rankdata

    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=-1).prod(axis=0))
    return np.asarray(ranks.prod(axis=0).sum(axis=-1) / np.where(scale > 0, scale, np.nan))


def _apart(estimates: Sequence[Estimate]) -> float | None:
    pairs = [(a, b) for i, a in enumerate(estimates) for b in estimates[:i]]
    if not pairs:
        return None
    return sum(a.low > b.high or b.low > a.high for a, b in pairs) / len(pairs)


def _spread(estimates: Sequence[Estimate]) -> float | None:
    half = float(np.median([(e.high - e.low) / 2 for e in estimates])) if estimates else 0.0
    if len(estimates) < 2 or half == 0:
        return None
    return float(np.std([e.value for e in estimates], ddof=1)) / half
