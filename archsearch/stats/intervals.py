"""95 % intervals of numbers that were taken with a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

from archsearch.stats.estimate import DistanceEstimate, Estimate

CONFIDENCE = 0.95
MANY = 1e6
"""Degrees of freedom of a variance that is as good as known."""


def mean_over_seeds(values: Sequence[float], within: float, *, within_freedom: float = MANY) -> Estimate:
    """The mean over seeds, with Student's interval.

    Its variance is the seeds' spread, s² / S, plus ``within``; the degrees of freedom are Welch and Satterthwaite's.
    Two seeds alone know their own spread badly, and their interval is honestly wide: `pool_intervals` does better in a
    study.

    Args:
        values: one a seed.
        within: variance of the mean that is left when the seeds agree: the finite sample, the finite pairs.
        within_freedom: degrees of freedom behind ``within``.
    """
    mean, count = float(np.mean(values)), len(values)
    between = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    total = between + within
    if total == 0:
        return Estimate(value=mean, low=mean, high=mean, by_seed=tuple(values))
    freedom = total**2 / (between**2 / max(1, count - 1) + within**2 / within_freedom)
    half = _quantile(freedom) * math.sqrt(total)
    return Estimate(value=mean, low=mean - half, high=mean + half, by_seed=tuple(values))


def validation_estimate(losses: Sequence[Tensor]) -> Estimate:
    """The validation loss from the losses of the fixed pairs, (pairs,) a seed.

    The pairs are the protocol's, the same for every candidate, so how hard they are is no part of the interval. What is
    left within a run is how differently two seeds do on the same pair: the interaction of seed and pair. With one seed
    that cannot be told from hardness, and the interval is that of other pairs.
    """
    table = torch.stack(list(losses)).double()  # seeds × pairs
    seeds, pairs = table.shape
    values = table.mean(1).tolist()
    rest = table - table.mean(1, keepdim=True)
    if seeds > 1:
        rest = rest - rest.mean(0)
    freedom = (pairs - 1) * max(1, seeds - 1)
    variance = float(rest.square().sum()) / freedom / (pairs * seeds)
    return mean_over_seeds(values, variance, within_freedom=freedom)


def distance_estimate(measured: Sequence[DistanceEstimate]) -> Estimate:
    """A distance from one measurement a seed, each with the error of its finite sample."""
    within = sum(one.error**2 for one in measured) / len(measured) ** 2
    return mean_over_seeds([one.value for one in measured], within)


def pool_intervals(estimates: Sequence[Estimate]) -> list[Estimate]:
    """The same estimates, with intervals by which candidates of one study are compared.

    One seed means the same draws for every candidate: what it does to all alike (the seed's own effect) is no part of a
    comparison. What is left, the interaction of seed and candidate, has about the same variance for all, and is pooled:
    with ten candidates of two seeds it has nine degrees of freedom, where each alone has one. Estimates with other
    numbers of seeds than most, or a single seed, come back as they are.
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
    """A weighted sum of estimates whose weights add up to 0, such as a difference, with its interval.

    All have the same seeds. What a seed does to all alike cancels; the rest is pooled over all the estimates given,
    those of weight 0 too, as in `pool_intervals`.
    """
    assert abs(sum(weights)) < 1e-9, "no contrast"
    table = np.array([e.by_seed for e in estimates])
    assert min(table.shape) > 1, "a contrast needs two estimates or more, each of the same two seeds or more"
    each = np.asarray(weights) @ table
    value = float(each.mean())
    half = _half_width(table) * math.sqrt(sum(weight**2 for weight in weights))
    return Estimate(value=value, low=value - half, high=value + half, by_seed=tuple(each.tolist()))


def _half_width(table: npt.NDArray[np.float64]) -> float:
    """Of the interval of one row's mean, from the interaction of the table's rows and its seeds, the columns."""
    rows, seeds = table.shape
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    freedom = (rows - 1) * (seeds - 1)
    return _quantile(freedom) * math.sqrt(float((rest**2).sum()) / freedom / seeds)


def _quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


Verdict = Literal["better", "worse", "cannot tell"]


def verdict(difference: Estimate) -> Verdict:
    """Of a difference in a number of which less is better."""
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "cannot tell"
