"""Gaussian process over the points of a discrete space, with known observation noise.

The kernel is a Matérn 5/2 with one length scale per column, plus a linear kernel of some columns. The hyperparameters
maximize the posterior: the length scales have log-normal priors that grow with the square root of the number of columns
(Hvarfner et al. 2024, arXiv 2402.02229), so that a space of many knobs can be learned from tens of observations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsearch.stats.regression import Array

RUN_NOISE = 0.007
"""Standard deviation of the expensive objective between runs, relative to its value, before anything is known of it."""

SQRT5 = math.sqrt(5)
JITTER = 1e-6
"""Added to the diagonal, relative to the variance of the observations."""

SCALE_PRIOR = (math.sqrt(2), math.sqrt(3))
"""Mean and deviation of a log length scale; half the logarithm of the number of columns is added to the mean."""

LINEAR_PRIOR = (math.log(0.3), 1.0)
"""Mean and deviation of the logarithm of a linear column's deviation."""

MAX_ITERATIONS = 40


@dataclass(frozen=True)
class Columns:
    """Meaning of the columns of a matrix of inputs.

    Attributes:
        unordered: whether a column holds categories, whose distance is 0 or 1.
        linear: whether a column has a linear kernel, too.
    """

    unordered: NDArray[np.bool_]
    linear: NDArray[np.bool_]

    def squared_distances(self, a: Array, b: Array) -> Array:
        """Squared distance per column, of shape (columns, rows of a, rows of b)."""
        differences = a.T[:, :, None] - b.T[:, None, :]
        squares: Array = np.square(differences, out=differences)
        squares[self.unordered] = squares[self.unordered] != 0
        return squares

    def products(self, a: Array, b: Array) -> Array:
        """Product per linear column, of shape (linear columns, rows of a, rows of b)."""
        products: Array = a.T[self.linear][:, :, None] * b.T[self.linear][:, None, :]
        return products


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process; `fit` builds it. Values are standardized inside: ``value = mean + scale * y``."""

    columns: Columns
    inputs: Array
    values: Array
    noise: Array
    theta: Array
    mean: float
    scale: float

    def kernel(self, a: Array, b: Array) -> Array:
        """Prior covariance of the standardized values at two sets of inputs, of shape (rows of a, rows of b)."""
        return _kernel(self.theta, self.columns.squared_distances(a, b), self.columns.products(a, b))[0]

    def prior_variance(self, inputs: Array) -> Array:
        """Prior variance of the standardized value at each input."""
        d = inputs.shape[1]
        weights: Array = np.exp(2 * self.theta[d + 1 :])
        variance: Array = np.exp(2 * self.theta[d]) + np.square(inputs[:, self.columns.linear]) @ weights
        return variance

    @cached_property
    def _covariance(self) -> Array:
        return self.kernel(self.inputs, self.inputs) + np.diag(self.noise + JITTER)

    @cached_property
    def _inverse(self) -> Array:
        return np.asarray(np.linalg.inv(self._covariance), dtype=np.float64)

    @cached_property
    def leave_one_out(self) -> tuple[Array, Array]:
        """Mean and variance (noise included) of each observation, predicted from the others (Sundararajan 2001)."""
        precision = np.diag(self._inverse)
        return self.values - (self._inverse @ self.values) / precision, 1 / precision

    @cached_property
    def inflation(self) -> float:
        """Factor of the variance that makes the leave-one-out errors as large as claimed; at least 1."""
        means, variances = self.leave_one_out
        return max(1.0, float(np.mean(np.square(self.values - means) / variances)))

    @property
    def log_density(self) -> float:
        """Mean log density of the observations under the leave-one-out predictions, with the inflated variance."""
        means, variances = self.leave_one_out
        variances = variances * self.inflation
        return float(np.mean(-np.square(self.values - means) / variances - np.log(2 * math.pi * variances)) / 2)

    @property
    def r_squared(self) -> float:
        """Share of the observations' variance that the leave-one-out predictions explain; below 0: nothing."""
        errors = self.values - self.leave_one_out[0]
        return 1.0 - float(np.square(errors).sum() / np.square(self.values - self.values.mean()).sum())

    def draws(self, inputs: Array, count: int, rng: np.random.Generator) -> Array:
        """Joint posterior draws of the noiseless standardized values, of shape (count, rows)."""
        cross = self.kernel(inputs, self.inputs)
        weights = cross @ self._inverse
        covariance = self.inflation * (self.kernel(inputs, inputs) - weights @ cross.T)
        eigenvalues, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        root = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
        drawn: Array = weights @ self.values + rng.standard_normal((count, len(inputs))) @ root.T
        return drawn

    def predict(self, inputs: Array) -> Array:
        """Mean of the noiseless value at each input, in the unit of the observations."""
        weights: Array = self.kernel(inputs, self.inputs) @ self._inverse
        return self.mean + self.scale * (weights @ self.values)


@dataclass(frozen=True)
class Conditional:
    """A process given noiseless values at some inputs, for several draws of those values at once."""

    process: GaussianProcess
    inputs: Array
    drawn: Array
    """Standardized values, of shape (draws, rows of inputs)."""

    @cached_property
    def _inverse(self) -> Array:
        covariance = self.process.kernel(self.inputs, self.inputs)
        # Points of the same inputs would make it singular.
        covariance += 1e-4 * np.diag(self.process.prior_variance(self.inputs))
        return np.asarray(np.linalg.inv(covariance), dtype=np.float64)

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Standardized means, of shape (draws, rows), and standard deviations, of shape (rows,)."""
        cross = self.process.kernel(inputs, self.inputs)
        weights = cross @ self._inverse
        variance = self.process.prior_variance(inputs) - np.einsum("ij,ij->i", weights, cross)
        return self.drawn @ weights.T, np.sqrt(np.clip(self.process.inflation * variance, 1e-12, None))


def fit(columns: Columns, inputs: Array, values: Array, noise: Array) -> GaussianProcess:
    """Fit the hyperparameters to observations.

    Args:
        inputs: of shape (observations, columns), in units of order 1.
        values: the observed values.
        noise: variance of the noise of each value, in the square of its unit.
    """
    from scipy.optimize import minimize

    mean, scale = float(values.mean()), float(values.std()) or 1.0
    y, known = (values - mean) / scale, noise / scale**2
    squares, products = columns.squared_distances(inputs, inputs), columns.products(inputs, inputs)
    d, linear = inputs.shape[1], int(columns.linear.sum())
    prior_mean = np.array([SCALE_PRIOR[0] + math.log(d) / 2] * d + [0.0] + [LINEAR_PRIOR[0]] * linear)
    prior_deviation = np.array([SCALE_PRIOR[1]] * d + [1.0] + [LINEAR_PRIOR[1]] * linear)

    def loss(theta: Array) -> tuple[float, Array]:
        return _negative_log_posterior(theta, squares, products, y, known, prior_mean, prior_deviation)

    bounds = [(m - 4 * s, m + 4 * s) for m, s in zip(prior_mean, prior_deviation, strict=True)]
    start = prior_mean - np.array([1.0] * d + [0.0] * (1 + linear))
    options = {"maxiter": MAX_ITERATIONS}
    found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return GaussianProcess(columns, inputs, y, known, found.x, mean, scale)


def _kernel(theta: Array, squares: Array, products: Array) -> tuple[Array, Array, Array]:
    """The kernel, its Matérn part, and the factor by which that part's derivatives are weighted squared distances."""
    d = len(squares)
    amplitude = math.exp(2 * theta[d])
    root = SQRT5 * np.sqrt(np.tensordot(np.exp(-2 * theta[:d]), squares, 1))
    decay = amplitude * np.exp(-root)
    matern = (1 + root + root**2 / 3) * decay
    total = matern + np.tensordot(np.exp(2 * theta[d + 1 :]), products, 1) if len(products) else matern
    return total, matern, (5 / 3) * (1 + root) * decay


def _negative_log_posterior(
    theta: Array, squares: Array, products: Array, y: Array, noise: Array, prior_mean: Array, prior_deviation: Array
) -> tuple[float, Array]:
    """Negative log posterior of the hyperparameters, up to a constant, and its gradient."""
    kernel, matern, factor = _kernel(theta, squares, products)
    covariance = kernel + np.diag(noise + JITTER)
    try:
        inverse = np.linalg.inv(covariance)
    except np.linalg.LinAlgError:
        return math.inf, np.zeros_like(theta)
    sign, log_determinant = np.linalg.slogdet(covariance)
    if sign <= 0:
        return math.inf, np.zeros_like(theta)
    alpha = inverse @ y
    # d loss / d covariance = (inverse − α αᵀ) / 2; each hyperparameter is the logarithm of a scale or deviation.
    slope = (inverse - np.outer(alpha, alpha)) / 2
    d = len(squares)
    gradient = np.concatenate(
        [
            np.exp(-2 * theta[:d]) * np.tensordot(squares, slope * factor, 2),
            [2 * float((slope * matern).sum())],
            2 * np.exp(2 * theta[d + 1 :]) * np.tensordot(products, slope, 2) if len(products) else [],
        ]
    )
    standard = (theta - prior_mean) / prior_deviation
    loss = (float(y @ alpha) + log_determinant + float(standard @ standard)) / 2
    return loss, gradient + standard / prior_deviation
