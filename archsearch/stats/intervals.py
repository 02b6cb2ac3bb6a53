"""95 % confidence intervals of numbers that were measured with a few seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

from archsearch.stats.estimate import DistanceEstimate, Estimate

CONFIDENCE = 0.95
KNOWN_VARIANCE = 1e6
"""Degrees of freedom of a variance that is practically known."""


def mean_over_seeds(values: Sequence[float], within: float, *, within_freedom: float = KNOWN_VARIANCE) -> Estimate:
    """Mean over seeds with Student's t interval.

    The variance of the mean is s² / S, for sample variance s² over S seeds, plus ``within``; the degrees of freedom
    follow Welch and Satterthwaite. With only two seeds the interval is wide, because s² is poorly estimated;
    `pool_intervals` yields narrower intervals within a study.

    Args:
        values: one value per seed.
        within: remaining variance of the mean if the seeds agree, from the finite number of samples or pairs.
        within_freedom: degrees of freedom of ``within``.
    """
    mean, count = float(np.mean(values)), len(values)
    between = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    total = between + within
    if total == 0:
        return Estimate(value=mean, low=mean, high=mean, by_seed=tuple(values))
    # Welch–Satterthwaite: (Σ vᵢ)² / Σ (vᵢ² / νᵢ)
    freedom = total**2 / (between**2 / max(1, count - 1) + within**2 / within_freedom)
    half = _quantile(freedom) * math.sqrt(total)
    return Estimate(value=mean, low=mean - half, high=mean + half, by_seed=tuple(values))


def validation_estimate(losses: Sequence[Tensor]) -> Estimate:
    """Validation loss with its interval, from the losses on the fixed validation pairs, (pairs,) per seed.

    All candidates share the protocol's pairs, so the difficulty of the pairs does not enter the interval. The variance
    within a run is the interaction of seed and pair: how differently two seeds perform on the same pair. With a single
    seed the interaction cannot be separated from difficulty, and the interval describes a new set of pairs.
    """
    table = torch.stack(list(losses)).double()  # [(P,)] * S -> (S, P) for S seeds and P pairs
    seeds, pairs = table.shape
    values = table.mean(1).tolist()
    residuals = table - table.mean(1, keepdim=True)
    if seeds > 1:
        residuals = residuals - residuals.mean(0)  # also remove each pair's difficulty
    freedom = (pairs - 1) * max(1, seeds - 1)
    variance = float(residuals.square().sum()) / freedom / (pairs * seeds)
    return mean_over_seeds(values, variance, within_freedom=freedom)


def distance_estimate(measured: Sequence[DistanceEstimate]) -> Estimate:
    """Distance with its interval, from one measurement per seed, each with the standard error of its finite sample."""
    within = sum(estimate.error**2 for estimate in measured) / len(measured) ** 2
    return mean_over_seeds([estimate.value for estimate in measured], within)


def pool_intervals(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Replace the intervals of estimates by intervals for comparing candidates of one study.

    A seed fixes the same random draws for every candidate, so its common effect on all candidates cancels in a
    comparison. The interaction of seed and candidate has about the same variance for all candidates and is pooled: ten
    candidates with two seeds have nine degrees of freedom, compared with one for each candidate alone. Estimates with a
    single seed, or with another number of seeds than most, are returned unchanged.
    """
    counts = [len(e.by_seed) for e in estimates]
    seeds = max(counts, key=counts.count, default=0)
    table = np.array([e.by_seed for e in estimates if len(e.by_seed) == seeds])
    if seeds < 2 or len(table) < 2:
        return list(estimates)
    half = _half_width(table)
    return [
        e.model_copy(update={"low": e.value - half, "high": e.value + half}) if len(e.by_seed) == seeds else e
        for e in estimates
    ]


def contrast(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """A contrast with its interval: a weighted sum of estimates with weights that add up to 0, e.g. a difference.

    All estimates must have the same seeds. Effects of a seed that are common to all estimates cancel; the interaction
    is pooled over all estimates, including those of weight 0, as in `pool_intervals`.
    """
    assert abs(sum(weights)) < 1e-9, "the weights of a contrast add up to 0"
    table = np.array([e.by_seed for e in estimates])
    assert min(table.shape) > 1, "a contrast needs two estimates or more, each of the same two seeds or more"
    by_seed = np.asarray(weights) @ table  # (E,) @ (E, S) -> (S,)
    value = float(by_seed.mean())
    half = _half_width(table) * math.sqrt(sum(weight**2 for weight in weights))
    return Estimate(value=value, low=value - half, high=value + half, by_seed=tuple(by_seed.tolist()))


def _half_width(table: npt.NDArray[np.float64]) -> float:
    """Half width of the interval of one row's mean, from the interaction of rows and columns (the seeds)."""
    rows, seeds = table.shape
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()  # two-way interaction, (E, S)
    freedom = (rows - 1) * (seeds - 1)
    return _quantile(freedom) * math.sqrt(float((residuals**2).sum()) / freedom / seeds)


def _quantile(freedom: float) -> float:
    """Two-sided quantile of Student's t distribution."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def difference(estimates: Mapping[str, Estimate], name: str, baseline: str) -> Estimate:
    """Difference of one of several estimates from another one, paired by seed; see `contrast`."""
    return contrast(list(estimates.values()), [float((key == name) - (key == baseline)) for key in estimates])


Verdict = Literal["better", "worse", "cannot tell"]


def verdict(difference: Estimate, better: Literal["lower", "higher"] = "lower") -> Verdict:
    """Verdict on a difference by its interval; ``better`` is the direction of an improvement."""
    if difference.low <= 0 <= difference.high:
        return "cannot tell"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"
