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
    assert [e.value for e in result] == pytest.approx([e.value for e in singles])
    assert result[0].high - result[0].value == pytest.approx(2.02 * 0.1 / 2**0.5, rel=0.25)
    assert sum(e.low <= t <= e.high for e, t in zip(result, truths.tolist(), strict=True)) >= 35


def test_candidates_with_fewer_seeds_are_corrected_by_the_effects_of_theirs() -> None:
    """Half of the candidates have only the first of three seeds, which makes every value 0.5 larger."""
    generator = torch.Generator().manual_seed(2)
    effects, truths = torch.tensor([0.5, -0.3, -0.2]), torch.linspace(1, 2, 40)
    errors, hits = [], 0
    for i, truth in enumerate(truths):
        count = 3 if i % 2 else 1
        errors.append((truth + effects[:count] + 0.02 * torch.randn(count, generator=generator)).tolist())
    result = intervals.pool_intervals([intervals.mean_over_seeds(run, 0.0) for run in errors])
    hits = sum(e.low <= t <= e.high for e, t in zip(result, truths.tolist(), strict=True))
    assert hits >= 35
    one, three = (result[i].high - result[i].value for i in (0, 1))
    assert 1.4 < one / three < 1.9, "an interval of one seed is about √3 times as wide"
    assert result[1].value == pytest.approx(sum(errors[1]) / 3), "with all seeds the value is their mean"
    assert len(result[0].by_seed) == 1


def test_seeds_that_come_later_make_one_estimate() -> None:
    first, second = intervals.mean_over_seeds([1.0], 0.04), intervals.mean_over_seeds([2.0], 0.09)
    assert intervals.combine_seeds([first, second]) == intervals.mean_over_seeds([1.0, 2.0], 0.0)
    distances = [DistanceEstimate(10.0, 1.0), DistanceEstimate(12.0, 2.0), DistanceEstimate(11.0, 1.5)]
    apart = [intervals.distance_estimate(distances[:2]), intervals.distance_estimate(distances[2:])]
    assert intervals.combine_seeds(apart) == intervals.distance_estimate(distances)
    assert intervals.combine_seeds([first]) == first


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


def test_seeds_do_not_average_out_the_error_of_a_sample_that_they_share() -> None:
    result = intervals.distance_estimate([DistanceEstimate(10.0, 1.0), DistanceEstimate(10.0, 1.0)])
    assert result.high - result.value == pytest.approx(1.96, rel=1e-3)


def test_an_error_of_few_groups_has_students_interval() -> None:
    eight_groups = DistanceEstimate(10.0, 1.0, 7)
    result = intervals.distance_estimate([eight_groups])
    assert result.high - result.value == pytest.approx(2.365, rel=1e-3)
    later = intervals.combine_seeds([result, intervals.distance_estimate([DistanceEstimate(10.0, 1.0)])])
    assert later.high - later.value == pytest.approx(2.365, rel=1e-3)


@pytest.mark.parametrize("within", [0.0, 0.05, 1.0])
def test_two_seeds_and_a_known_part_cover_as_often_as_they_say(within: float) -> None:
    """Welch and Satterthwaite's interval covers 88 % where the known part is small."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 2, generator=generator) + within**0.5 * torch.randn(2000, 1, generator=generator)
    hits = [e.low <= 0 <= e.high for v in values.tolist() if (e := intervals.mean_over_seeds(v, within))]
    assert sum(hits) / len(hits) > 0.938
