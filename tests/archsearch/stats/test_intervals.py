from __future__ import annotations

import pytest
import torch

from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate


def test_two_seeds_have_students_interval() -> None:
    result = intervals.mean_over_seeds([1.0, 2.0], 0.0)
    assert result.value == 1.5
    assert result.by_seed == (1.0, 2.0)
    assert result.high - result.value == pytest.approx(12.706 * 0.5, rel=1e-3)


def test_a_known_variance_within_has_the_normal_interval() -> None:
    result = intervals.mean_over_seeds([3.0], 0.04)
    assert result.high - result.value == pytest.approx(1.96 * 0.2, rel=1e-3)


def test_equal_seeds_without_noise_have_no_width() -> None:
    result = intervals.mean_over_seeds([2.0, 2.0, 2.0], 0.0)
    assert (result.low, result.value, result.high) == (2.0, 2.0, 2.0)


def test_intervals_have_their_nominal_coverage() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        seeds = 5 + 0.3 * torch.randn(3, generator=generator)
        result = intervals.mean_over_seeds(seeds.tolist(), 0.0)
        hits += result.low <= 5 <= result.high
    assert 0.93 < hits / 1000 < 0.97


def test_pooling_uses_all_candidates_and_removes_common_seed_effects() -> None:
    generator = torch.Generator().manual_seed(1)
    truths = torch.linspace(1, 2, 40)
    common = torch.tensor([0.5, -0.5])
    runs = [(t + common + 0.1 * torch.randn(2, generator=generator)).tolist() for t in truths]
    singles = [intervals.mean_over_seeds(run, 0.0) for run in runs]
    result = intervals.pool_intervals(singles)
    assert [e.value for e in result] == [e.value for e in singles]
    assert result[0].high - result[0].value == pytest.approx(2.02 * 0.1 / 2**0.5, rel=0.25)
    assert sum(e.low <= t <= e.high for e, t in zip(result, truths.tolist(), strict=True)) >= 35
    single = intervals.mean_over_seeds([1.0], 0.01)
    assert intervals.pool_intervals([single, *singles]) == [single, *result]


def test_estimates_without_replicates_are_unchanged() -> None:
    single, twice = intervals.mean_over_seeds([1.0], 0.01), intervals.mean_over_seeds([1.0, 2.0], 0.0)
    assert intervals.pool_intervals([]) == []
    assert intervals.pool_intervals([single, single]) == [single, single]
    assert intervals.pool_intervals([twice]) == [twice]


def test_difficulty_of_the_pairs_does_not_widen_the_interval() -> None:
    """Two seeds that differ by a constant on pairs of varying difficulty: only the constant counts."""
    difficulty = torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    result = intervals.validation_estimate([difficulty, difficulty + 0.01])
    plain = intervals.mean_over_seeds([float(difficulty.mean()), float(difficulty.mean()) + 0.01], 0.0)
    assert result.high - result.low == pytest.approx(plain.high - plain.low, rel=1e-6)
    one_seed = intervals.validation_estimate([difficulty])
    assert one_seed.high - one_seed.value == pytest.approx(1.96 * float(difficulty.std()) / 512**0.5, rel=0.01)


def test_distances_add_the_error_of_their_sample() -> None:
    result = intervals.distance_estimate([DistanceEstimate(10.0, 1.0), DistanceEstimate(10.0, 1.0)])
    assert result.high - result.value == pytest.approx(1.96 / 2**0.5, rel=1e-3)
