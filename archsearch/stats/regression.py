"""Non-negative linear latency models, fitted on relative error, with conformal prediction intervals.

A net's latency is a linear combination of its features. An observation is a latency, or the ratio of two latencies. The
coefficients minimize the squared relative errors of the observations, in units of their tolerance, plus the squared
distances from the prior's mean, in units of the prior's deviation, subject to being non-negative
(`scipy.optimize.nnls`).

Intervals are conformal: each observation is left out in turn and predicted by a fit of the others, and its error is
divided by the standard deviation that this fit claims. Quantiles of these normalized errors scale the claimed deviation
of a new prediction. Under exchangeability such intervals have the intended coverage even if the claimed deviations are
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REWEIGHTINGS = 4
"""Number of reweighted fits if ratios are observed: their relative error depends on the coefficients."""

TOLERANCES = tuple(0.005 * 2**step for step in range(6))
"""Candidate values of `best_tolerance`: 0.5 % to 16 %."""


@dataclass(frozen=True)
class Observation:
    """An observed latency: ``features`` take ``value`` milliseconds, or ``value`` times as long as ``against``.

    ``tolerance`` is the standard deviation of the relative error.
    """

    features: Array
    value: float
    tolerance: float
    against: Array | None = None

    def ratio(self, coefficients: Array) -> float:
        """Predicted value divided by observed value."""
        time = float(self.features @ coefficients)
        return time / self.value / (1.0 if self.against is None else float(self.against @ coefficients))


@dataclass(frozen=True)
class NormalPrior:
    """Independent normal prior of the coefficients: means and standard deviations."""

    mean: Array
    deviation: Array


@dataclass(frozen=True)
class LinearFit:
    """Fitted coefficients and their covariance."""

    coefficients: Array
    covariance: Array

    def deviation(self, observation: Observation) -> float:
        """Claimed standard deviation of the log of the ratio of prediction to truth."""
        # delta method: gradient of log(f · c) with respect to the coefficients c
        gradient = observation.features / float(observation.features @ self.coefficients)
        if observation.against is not None:
            gradient = gradient - observation.against / float(observation.against @ self.coefficients)
        return math.sqrt(max(0.0, float(gradient @ self.covariance @ gradient)) + observation.tolerance**2)

    def error(self, observation: Observation) -> tuple[float, float]:
        """Log error of the prediction of an observation, and its claimed standard deviation."""
        return math.log(observation.ratio(self.coefficients)), self.deviation(observation)


def fit(observations: Sequence[Observation], prior: NormalPrior) -> LinearFit:
    """Fit the coefficients; see the module docstring for the objective.

    The covariance is that of the unconstrained problem, which is an upper bound.
    """
    from scipy.optimize import nnls

    prior_rows = np.diag(1 / prior.deviation)
    coefficients = np.maximum(prior.mean, prior.deviation)
    rows = prior_rows
    for _ in range(REWEIGHTINGS if any(e.against is not None for e in observations) else 1):
        linear = [_row(e, coefficients) for e in observations]
        rows = np.vstack([*(row for row, _ in linear), prior_rows])  # (observations + features, features)
        targets = np.concatenate([[target for _, target in linear], prior.mean / prior.deviation])
        coefficients = nnls(rows, targets, maxiter=100 * rows.shape[1])[0]
    return LinearFit(coefficients, np.asarray(np.linalg.inv(rows.T @ rows), dtype=np.float64))


def _row(observation: Observation, coefficients: Array) -> tuple[Array, float]:
    """Row and target of the least squares problem; a ratio f·c / a·c = v becomes (f - v a)·c = 0."""
    if observation.against is None:
        scale = observation.tolerance * observation.value
        return observation.features / scale, observation.value / scale
    scale = observation.tolerance * observation.value * float(observation.against @ coefficients)
    return (observation.features - observation.value * observation.against) / scale, 0.0


def leave_one_out(observations: Sequence[Observation], prior: NormalPrior) -> list[tuple[float, float]]:
    """Log error and claimed standard deviation of each observation, predicted by a fit of the others."""
    return [fit([*observations[:i], *observations[i + 1 :]], prior).error(o) for i, o in enumerate(observations)]


def conformal_quantile(errors: Sequence[float], coverage: float) -> float:
    """Magnitude that a new, exchangeable error does not exceed with probability ``coverage``.

    This is the ⌈coverage · (n + 1)⌉-th smallest magnitude, or the largest if there are too few errors.
    """
    ordered = sorted(abs(error) for error in errors)
    rank = math.ceil(coverage * (len(ordered) + 1))
    return ordered[min(rank, len(ordered)) - 1]


def weak_prior(features: Array, times: Array) -> NormalPrior:
    """Weak prior for fits without a device profile.

    The mean is zero; the deviation of a coefficient is about the one with which its feature alone would explain the
    measured latencies.

    Args:
        features: (records, features); no column may be zero throughout.
        times: (records,) latencies in milliseconds.
    """
    return NormalPrior(np.zeros(features.shape[1]), np.median(times) / features.mean(0))


def best_tolerance(features: Array, times: Array, prior: NormalPrior) -> float:
    """The relative error of a record, among `TOLERANCES`, with the highest leave-one-out likelihood.

    A larger tolerance also gives the prior more weight.
    """

    def negative_log_likelihood(tolerance: float) -> float:
        errors = leave_one_out([Observation(x, t, tolerance) for x, t in zip(features, times, strict=True)], prior)
        return sum(math.log(claimed) + (error / claimed) ** 2 / 2 for error, claimed in errors)

    best: float = min(TOLERANCES, key=negative_log_likelihood)
    return best
