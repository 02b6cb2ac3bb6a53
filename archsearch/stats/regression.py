"""Non-negative linear models of milliseconds, fitted on relative error, that say how wrong they may be.

A net's time is the sum of its features, each times a coefficient. Evidence is a time, or the ratio of two times. The
coefficients minimise the squared relative errors of the evidence, in units of its tolerance, plus the squared distances
from their prior, in units of the prior's deviation, over the non-negative numbers (`scipy.optimize.nnls`).

The interval is conformal: each piece of evidence is left out in turn, predicted by a fit of the others, and its error
divided by the deviation that this fit claims. The quantiles of those normalised errors are what a claimed deviation is
worth, whatever of the claim was wrong; under exchangeability an interval so scaled holds its share of new nets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REWEIGHTINGS = 4
"""A ratio's relative error depends on the coefficients; so many fits settle it."""

TOLERANCES = tuple(0.005 * 2**step for step in range(6))
"""What `best_tolerance` chooses from: 0.5 % to 16 %."""


@dataclass(frozen=True)
class Observation:
    """``features`` take ``value`` milliseconds, or ``value`` times what ``against`` takes, within a ``tolerance``."""

    features: Array
    value: float
    tolerance: float
    against: Array | None = None

    def ratio(self, coefficients: Array) -> float:
        """What the coefficients say of it, over what it says itself."""
        time = float(self.features @ coefficients)
        return time / self.value / (1.0 if self.against is None else float(self.against @ coefficients))


@dataclass(frozen=True)
class NormalPrior:
    """What is held of the coefficients before any evidence: their means and standard deviations."""

    mean: Array
    deviation: Array


@dataclass(frozen=True)
class LinearFit:
    """Coefficients, and how sure of them the evidence and the prior make."""

    coefficients: Array
    covariance: Array

    def deviation(self, evidence: Observation) -> float:
        """Claimed standard deviation of the logarithm of a prediction's ratio to the truth."""
        slope = evidence.features / float(evidence.features @ self.coefficients)
        if evidence.against is not None:
            slope = slope - evidence.against / float(evidence.against @ self.coefficients)
        return math.sqrt(max(0.0, float(slope @ self.covariance @ slope)) + evidence.tolerance**2)

    def error(self, evidence: Observation) -> tuple[float, float]:
        """Log error of what it says of evidence, and its claimed deviation."""
        return math.log(evidence.ratio(self.coefficients)), self.deviation(evidence)


def fit(evidence: Sequence[Observation], prior: NormalPrior) -> LinearFit:
    """The coefficients of least error; see the module.

    The covariance is that of the same problem without the bound at zero, which only makes it larger.
    """
    from scipy.optimize import nnls

    near_prior = np.diag(1 / prior.deviation)
    coefficients = np.maximum(prior.mean, prior.deviation)
    rows = near_prior
    for _ in range(REWEIGHTINGS if any(e.against is not None for e in evidence) else 1):
        linear = [_row(e, coefficients) for e in evidence]
        rows = np.vstack([*(row for row, _ in linear), near_prior])
        targets = np.concatenate([[target for _, target in linear], prior.mean / prior.deviation])
        coefficients = nnls(rows, targets, maxiter=100 * rows.shape[1])[0]
    return LinearFit(coefficients, np.asarray(np.linalg.inv(rows.T @ rows), dtype=np.float64))


def _row(evidence: Observation, coefficients: Array) -> tuple[Array, float]:
    if evidence.against is None:
        scale = evidence.tolerance * evidence.value
        return evidence.features / scale, evidence.value / scale
    scale = evidence.tolerance * evidence.value * float(evidence.against @ coefficients)
    return (evidence.features - evidence.value * evidence.against) / scale, 0.0


def leave_one_out(evidence: Sequence[Observation], prior: NormalPrior) -> list[tuple[float, float]]:
    """Of each piece of evidence, predicted by a fit of the others: the log error, and its claimed deviation."""
    return [fit([*evidence[:i], *evidence[i + 1 :]], prior).error(one) for i, one in enumerate(evidence)]


def conformal_quantile(errors: Sequence[float], coverage: float) -> float:
    """The magnitude that a new error keeps within with that probability, if it is one of a kind with these.

    The ⌈coverage · (n + 1)⌉-th smallest; with too few errors for the coverage, the largest.
    """
    ordered = sorted(abs(error) for error in errors)
    rank = math.ceil(coverage * (len(ordered) + 1))
    return ordered[min(rank, len(ordered)) - 1]


def weak_prior(features: Array, times: Array) -> NormalPrior:
    """For records alone: zero, within about the time that each feature would take if it took all.

    Args:
        features: (records, features), every feature present somewhere.
        times: (records,) milliseconds.
    """
    return NormalPrior(np.zeros(features.shape[1]), np.median(times) / features.mean(0))


def best_tolerance(features: Array, times: Array, prior: NormalPrior) -> float:
    """The relative error of one record, among `TOLERANCES`, under which the left-out records are likeliest.

    It is also the weight of the prior: the larger the error, the more of the coefficients is left to it.
    """

    def unlikelihood(tolerance: float) -> float:
        errors = leave_one_out([Observation(x, t, tolerance) for x, t in zip(features, times, strict=True)], prior)
        return sum(math.log(claimed) + (error / claimed) ** 2 / 2 for error, claimed in errors)

    best: float = min(TOLERANCES, key=unlikelihood)
    return best
