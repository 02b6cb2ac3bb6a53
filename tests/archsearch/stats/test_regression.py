"""Latency regression: recovers known coefficients, falls back to the prior, and claims calibrated errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archsearch.stats.regression import (
    NormalPrior,
    Observation,
    best_tolerance,
    conformal_quantile,
    fit,
    leave_one_out,
    weak_prior,
)

TRUE = np.array([0.01, 0.5, 0.0, 0.02])
RNG = np.random.default_rng(7)
NETS = RNG.uniform(1, 100, (60, 4))


def observations(rows: np.ndarray, *, noise: float = 0.0, tolerance: float = 0.01, seed: int = 0) -> list[Observation]:
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(rows)))
    return [Observation(row, float(row @ TRUE * factor), tolerance) for row, factor in zip(rows, factors, strict=True)]


def test_exact_times_give_the_coefficients_back() -> None:
    times = NETS @ TRUE
    result = fit(observations(NETS, tolerance=0.001), weak_prior(NETS, times))
    assert result.coefficients @ NETS.T == pytest.approx(times, rel=0.001)
    assert result.coefficients == pytest.approx(TRUE, abs=0.001)


def test_no_coefficient_is_negative() -> None:
    times = NETS @ np.array([0.01, 0.5, -0.05, 0.02])
    data = [Observation(row, float(time), 0.01) for row, time in zip(NETS, times, strict=True)]
    assert (fit(data, weak_prior(NETS, times)).coefficients >= 0).all()


def test_without_observations_the_prior_is_returned() -> None:
    prior = NormalPrior(np.array([1.0, 2.0]), np.array([0.5, 0.5]))
    result = fit([], prior)
    assert result.coefficients == pytest.approx(prior.mean)
    assert result.covariance == pytest.approx(np.diag([0.25, 0.25]))


def test_an_observation_moves_only_its_own_features() -> None:
    prior = NormalPrior(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    result = fit([Observation(np.array([10.0, 0.0]), 5.0, 0.01)], prior)
    assert result.coefficients == pytest.approx([0.5, 2.0], rel=0.01)


def test_a_ratio_is_fitted_as_a_ratio() -> None:
    a, b = np.array([10.0, 1.0]), np.array([1.0, 10.0])
    data = [Observation(a, 3.0, 0.001, against=b)]
    result = fit(data, NormalPrior(np.ones(2), np.ones(2)))
    assert data[0].ratio(result.coefficients) == pytest.approx(1, abs=0.001)
    assert a @ result.coefficients / (b @ result.coefficients) == pytest.approx(3, rel=0.001)


def test_fewer_observations_claim_a_wider_deviation() -> None:
    prior = weak_prior(NETS, NETS @ TRUE)
    new = Observation(NETS[-1], 1.0, 0.01)
    few, many = (fit(observations(NETS[:n]), prior).deviation(new) for n in (3, 50))
    assert few > 2 * many
    assert many >= 0.01, "never less than one time's own error"


@pytest.mark.parametrize(("coverage", "expected"), [(0.5, 5), (0.9, 9), (0.99, 9)])
def test_the_conformal_quantile_is_an_order_statistic(coverage: float, expected: float) -> None:
    assert conformal_quantile([-1, 2, -3, 4, 5, -6, 7, 8, 9], coverage) == expected


def test_the_interval_covers_new_nets_even_if_the_tolerance_is_wrong() -> None:
    """Several random draws: 90 % intervals of a fit that assumes errors of 2 % when they are 8 %."""
    covered = []
    for seed in range(12):
        rows = np.random.default_rng(seed).uniform(1, 100, (65, 4))
        data = observations(rows, noise=0.08, tolerance=0.02, seed=seed)
        prior = weak_prior(rows[:25], np.array([e.value for e in data[:25]]))
        result = fit(data[:25], prior)
        width = conformal_quantile([error / claimed for error, claimed in leave_one_out(data[:25], prior)], 0.9)
        covered += [abs(error) <= width * claimed for error, claimed in map(result.error, data[25:])]
    assert 0.85 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(("noise", "lower", "upper"), [(0.001, 0.005, 0.005), (0.04, 0.02, 0.08), (0.3, 0.16, 0.16)])
def test_the_tolerance_follows_the_noise(noise: float, lower: float, upper: float) -> None:
    times = np.array([e.value for e in observations(NETS[:25], noise=noise)])
    assert lower <= best_tolerance(NETS[:25], times, weak_prior(NETS[:25], times)) <= upper


def test_an_error_is_a_logarithm() -> None:
    result = fit([], NormalPrior(np.array([2.0]), np.array([1.0])))
    assert result.error(Observation(np.array([1.0]), 1.0, 0.01))[0] == pytest.approx(math.log(2))
