"""95 % confidence intervals of numbers that were measured with a few seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
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
    """Mean over seeds with Banerjee's interval.

    The variance of the mean is s² / S, for sample variance s² over S seeds, plus ``within``. With only two seeds the
    interval is wide, because s² is poorly estimated; `pool_intervals` yields narrower intervals within a study.

    Args:
        values: one value per seed.
        within: remaining variance of the mean if the seeds agree, from the finite number of samples or pairs.
        within_freedom: degrees of freedom of ``within``.
    """
    mean, count = float(np.mean(values)), len(values)
    between = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    half = half_width([(between, max(1, count - 1)), (within, within_freedom)])
    return Estimate(value=mean, low=mean - half, high=mean + half, by_seed=tuple(values))


def half_width(variances: Iterable[tuple[float, float]], confidence: float = CONFIDENCE) -> float:
    """Half width of the interval of a number whose variance is a sum of estimates, each with its degrees of freedom.

    The square is Σ t²(νᵢ) vᵢ (Banerjee 1961, Sankhyā 23). It covers at least as often as intended, whatever the true
    variances are, because the distribution function of χ² with one degree of freedom is concave. Welch and
    Satterthwaite's covers too little where a variance of one degree of freedom happens to be estimated near zero.
    """
    return math.sqrt(sum(v * quantile(freedom, confidence) ** 2 for v, freedom in variances if v > 0))


def quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t distribution."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


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
    """Distance with its interval, from one measurement per seed, each with the standard error of its finite sample.

    The samples of all seeds have the same prompts and noise.
    """
    return _with_errors([e.value for e in measured], [e.error for e in measured], [e.freedom for e in measured])


def combine_seeds(parts: Sequence[Estimate]) -> Estimate:
    """One estimate from several of the same candidate, each of its own seeds.

    Of a validation loss the spread between the seeds is all that is uncertain: all runs have the same pairs.
    """
    if len(parts) == 1:
        return parts[0]
    errors = [error for e in parts for error in e.errors]
    return _with_errors([v for e in parts for v in e.by_seed], errors, [e.error_freedom for e in parts])


def _with_errors(values: Sequence[float], errors: Sequence[float], freedoms: Iterable[int | None]) -> Estimate:
    """The mean of values whose sampling errors are those of the same prompts and noise, so that seeds do not average
    them out: their variance is that of one seed."""
    freedom = min((f for f in freedoms if f is not None), default=None)
    within = sum(error**2 for error in errors) / len(values)
    estimate = mean_over_seeds(values, within, within_freedom=KNOWN_VARIANCE if freedom is None else freedom)
    return estimate.model_copy(update={"errors": tuple(errors), "error_freedom": freedom})


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
    half_widths = quantile(fitted.freedom) * np.sqrt(fitted.variance * fitted.leverage)
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
    measured = np.arange(seeds) < counts[:, None]  # (E, S)
    table = np.zeros(measured.shape)
    table[measured] = np.fromiter(itertools.chain.from_iterable(by_seed), float, int(counts.sum()))
    # Each candidate's effect is eliminated by subtracting means over its seeds; what is left is a regression on the
    # effects of the seeds, of which the last is minus the sum of the others.
    effects = np.concatenate([np.eye(seeds - 1), -np.ones((1, seeds - 1))])
    design_means = (np.cumsum(effects, axis=0) / np.arange(1, seeds + 1)[:, None])[np.maximum(counts, 1) - 1]
    means = np.where(counts > 0, table.sum(axis=1) / np.maximum(counts, 1), math.nan)
    centered = (effects - design_means[:, None])[measured]  # (E, S, S - 1) -> (values, S - 1)
    observed = (table - means[:, None])[measured]
    inverse = np.linalg.inv(centered.T @ centered)
    solution = inverse @ (centered.T @ observed)
    residuals = observed - centered @ solution
    leverage = 1 / np.maximum(counts, 1) + np.einsum("ij,jk,ik->i", design_means, inverse, design_means)
    offsets = np.cumsum(effects @ solution) / np.arange(1, seeds + 1)
    variance = float(residuals @ residuals) / freedom
    return AdditiveFit(means - design_means @ solution, leverage, tuple(offsets.tolist()), variance, freedom)


def independent_difference(a: Estimate, b: Estimate) -> Estimate:
    """Difference a − b of two estimates with independent errors, by their intervals."""
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return Estimate(value=value, low=low, high=value + math.hypot(a.high - a.value, b.value - b.low))


def are_apart(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals do not overlap, which is a stricter test than a verdict on their difference."""
    return a.low > b.high or b.low > a.high


Verdict = Literal["better", "worse", "cannot tell"]


def verdict(difference: Estimate, better: Literal["lower", "higher"] = "lower") -> Verdict:
    """Verdict on a difference by its interval; ``better`` is the direction of an improvement."""
    if difference.low <= 0 <= difference.high:
        return "cannot tell"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"
