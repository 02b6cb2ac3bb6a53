from __future__ import annotations

import pytest
import torch

from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate


def test_two_seeds_have_students_interval() -> None:
    found = intervals.mean_over_seeds([1.0, 2.0], 0.0)
    assert found.value == 1.5
    assert found.by_seed == (1.0, 2.0)
    assert found.high - found.value == pytest.approx(12.706 * 0.5, rel=1e-3)


def test_a_known_variance_within_has_the_normal_interval() -> None:
    found = intervals.mean_over_seeds([3.0], 0.04)
    assert found.high - found.value == pytest.approx(1.96 * 0.2, rel=1e-3)


def test_equal_seeds_without_noise_have_no_width() -> None:
    found = intervals.mean_over_seeds([2.0, 2.0, 2.0], 0.0)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        seeds = 5 + 0.3 * torch.randn(3, generator=generator)
        found = intervals.mean_over_seeds(seeds.tolist(), 0.0)
        hits += found.low <= 5 <= found.high
    assert 0.93 < hits / 1000 < 0.97


def test_pooling_uses_all_candidates_and_leaves_out_what_a_seed_does_to_all() -> None:
    generator = torch.Generator().manual_seed(1)
    truths = torch.linspace(1, 2, 40)
    common = torch.tensor([0.5, -0.5])
    runs = [(t + common + 0.1 * torch.randn(2, generator=generator)).tolist() for t in truths]
    singles = [intervals.mean_over_seeds(run, 0.0) for run in runs]
    found = intervals.pool_intervals(singles)
    assert [e.value for e in found] == [e.value for e in singles]
    assert found[0].high - found[0].value == pytest.approx(2.02 * 0.1 / 2**0.5, rel=0.25)
    assert sum(e.low <= t <= e.high for e, t in zip(found, truths.tolist(), strict=True)) >= 35
    alone = intervals.mean_over_seeds([1.0], 0.01)
    assert intervals.pool_intervals([alone, *singles]) == [alone, *found]


def test_nothing_to_pool_is_left_alone() -> None:
    alone, twice = intervals.mean_over_seeds([1.0], 0.01), intervals.mean_over_seeds([1.0, 2.0], 0.0)
    assert intervals.pool_intervals([]) == []
    assert intervals.pool_intervals([alone, alone]) == [alone, alone]
    assert intervals.pool_intervals([twice]) == [twice]


def test_hardness_of_the_pairs_is_no_part_of_the_interval() -> None:
    """Two seeds that differ by a constant on pairs of very different hardness: only the constant counts."""
    hardness = torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    found = intervals.validation_estimate([hardness, hardness + 0.01])
    plain = intervals.mean_over_seeds([float(hardness.mean()), float(hardness.mean()) + 0.01], 0.0)
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=1e-6)
    one = intervals.validation_estimate([hardness])
    assert one.high - one.value == pytest.approx(1.96 * float(hardness.std()) / 512**0.5, rel=0.01)


def test_distances_add_the_error_of_their_sample() -> None:
    found = intervals.distance_estimate([DistanceEstimate(10.0, 1.0), DistanceEstimate(10.0, 1.0)])
    assert found.high - found.value == pytest.approx(1.96 / 2**0.5, rel=1e-3)
