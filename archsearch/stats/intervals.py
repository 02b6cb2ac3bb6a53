"""95 % confidence intervals of numbers that were measured with a few seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

from archsearch.stats.estimate import DistanceEstimate, Estimate

CONFIDENCE = 0.95
KNOWN_VARIANCE = 1e6
"""Degrees of freedom of a variance that is practically known."""

PLUS_FOUR = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
"""Two pseudo-hits and two pseudo-misses (Agresti and Coull 1998), so that no hits among few items do not yield an
interval of zero width."""


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


def rate_estimate(table: Tensor) -> Estimate:
    """Mean of a table (seeds, items) of values in [0, 1], with an interval over items and seeds."""
    by_item = table.mean(0)
    within = float(torch.cat([by_item, PLUS_FOUR]).var()) / len(by_item)
    mean = mean_over_seeds(table.mean(1).tolist(), within, within_freedom=max(1, len(by_item) - 1))
    return mean.model_copy(update={"low": max(0.0, mean.low), "high": min(1.0, mean.high)})


def distance_estimate(measured: Sequence[DistanceEstimate]) -> Estimate:
    """Distance with its interval, from one measurement per seed, each with the standard error of its finite sample."""
    return _with_errors([estimate.value for estimate in measured], [estimate.error for estimate in measured])


def combine_seeds(parts: Sequence[Estimate]) -> Estimate:
    """One estimate from several of the same candidate, each of its own seeds.

    Of a validation loss the spread between the seeds is all that is uncertain: all runs have the same pairs.
    """
    if len(parts) == 1:
        return parts[0]
    return _with_errors([v for e in parts for v in e.by_seed], [error for e in parts for error in e.errors])


def _with_errors(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    estimate = mean_over_seeds(values, sum(error**2 for error in errors) / len(values) ** 2)
    return estimate.model_copy(update={"errors": tuple(errors)})


def pool_intervals(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Replace values and intervals of estimates by those for comparing candidates of one study.

    A seed fixes the same random draws for every candidate, so its common effect on all candidates cancels in a
    comparison. The interaction of seed and candidate has about the same variance for all candidates and is pooled: ten
    candidates with two seeds have nine degrees of freedom, compared with one for each candidate alone. Candidates may
    have different numbers of seeds: values = candidate + seed + interaction is then fitted by least squares, and the
    value of a candidate without some seeds is corrected by the effects of those that it has; the others keep theirs.
    Estimates are returned unchanged if fewer than two have several seeds.
    """
    fitted = additive_fit([e.by_seed for e in estimates])
    if fitted is None:
        return list(estimates)
    half_widths = _quantile(fitted.freedom) * np.sqrt(fitted.variance * fitted.leverage)
    values = [float(v) if e.by_seed else e.value for v, e in zip(fitted.values, estimates, strict=True)]
    return [
        e.model_copy(update={"value": value, "low": value - float(half), "high": value + float(half)})
        if e.by_seed
        else e
        for e, value, half in zip(estimates, values, half_widths, strict=True)
    ]


class AdditiveFit(NamedTuple):
    """Fit of value = candidate + seed + interaction, where the seeds' effects add up to 0.

    Attributes:
        values: effect of each candidate: its mean over all seeds.
        leverage: variance of each, in units of the interaction's.
        offsets: mean effect of the first one, two, … seeds, by which the mean over these is too large.
        variance: variance of the interaction.
        freedom: its degrees of freedom.
    """

    values: npt.NDArray[np.float64]
    leverage: npt.NDArray[np.float64]
    offsets: tuple[float, ...]
    variance: float
    freedom: int


def additive_fit(by_seed: Sequence[Sequence[float]]) -> AdditiveFit | None:
    """Fit candidates, each with a value for the first one or more seeds; None without two that have several."""
    counts = np.array([len(values) for values in by_seed], dtype=int)
    seeds = int(max(counts, default=0))
    # Of each seed beyond the first, one value fixes the seed's effect.
    freedom = int(np.maximum(counts - 1, 0).sum()) - (seeds - 1)
    if seeds < 2 or freedom < 1:
        return None
    # Each candidate's effect is eliminated by subtracting means over its seeds; what is left is a regression on the
    # effects of the seeds, of which the last is minus the sum of the others.
    effects = np.concatenate([np.eye(seeds - 1), -np.ones((1, seeds - 1))])
    design_means = np.array([effects[: max(count, 1)].mean(axis=0) for count in counts])  # (E, S - 1)
    means = np.array([np.mean(values) if len(values) else math.nan for values in by_seed])
    centered = np.concatenate([effects[:count] - design_means[i] for i, count in enumerate(counts)])
    observed = np.concatenate([np.asarray(values) - means[i] for i, values in enumerate(by_seed)])
    inverse = np.linalg.inv(centered.T @ centered)
    solution = inverse @ (centered.T @ observed)
    residuals = observed - centered @ solution
    leverage = 1 / np.maximum(counts, 1) + np.einsum("ij,jk,ik->i", design_means, inverse, design_means)
    offsets = np.cumsum(effects @ solution) / np.arange(1, seeds + 1)
    variance = float(residuals @ residuals) / freedom
    return AdditiveFit(means - design_means @ solution, leverage, tuple(offsets.tolist()), variance, freedom)


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


def independent_difference(a: Estimate, b: Estimate) -> Estimate:
    """Difference a − b of two estimates with independent errors, by their intervals."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return Estimate(value=value, low=low, high=value + math.hypot(a.high - a.value, b.value - b.low))


Verdict = Literal["better", "worse", "cannot tell"]


def verdict(difference: Estimate, better: Literal["lower", "higher"] = "lower") -> Verdict:
    """Verdict on a difference by its interval; ``better`` is the direction of an improvement."""
    if difference.low <= 0 <= difference.high:
        return "cannot tell"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"
