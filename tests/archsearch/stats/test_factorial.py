from __future__ import annotations

import itertools
import random

import pytest

from archsearch.spaces.summary import KnobSummary
from archsearch.stats.factorial import Change, chance_of_sign, changes, fit, fit_over_seeds

KNOBS = (
    KnobSummary("a", ("off", "on"), ordered=False, base=0),
    KnobSummary("b", ("x", "y", "z"), ordered=False, base=0),
    KnobSummary("c", ("1", "2"), ordered=True, base=1),
)
POINTS = [dict(zip("abc", choices, strict=True)) for choices in itertools.product(range(2), range(3), range(2))]


def value(point: dict[str, int]) -> float:
    return 5 + 2 * point["a"] + (0, 1, -1)[point["b"]] - 0.5 * point["c"] + 3 * (point["a"] and point["b"] == 2)


def test_without_noise_effects_are_averages_over_the_other_choices() -> None:
    found = fit(POINTS, [value(p) for p in POINTS], KNOBS)
    assert found.main[Change("a", "off", "on")].value == pytest.approx(2 + 3 / 3)
    assert found.main[Change("b", "x", "y")].value == pytest.approx(1)
    assert found.main[Change("b", "x", "z")].value == pytest.approx(-1 + 3 / 2)
    assert found.main[Change("b", "y", "z")].value == pytest.approx(-2 + 3 / 2)
    assert found.main[Change("c", "2", "1")].value == pytest.approx(0.5)
    assert found.interactions[Change("a", "off", "on"), Change("b", "x", "z")].value == pytest.approx(3)
    assert found.interactions[Change("a", "off", "on"), Change("b", "x", "y")].value == pytest.approx(0)
    assert found.explained == pytest.approx(1)
    assert found.mean == pytest.approx(sum(map(value, POINTS)) / len(POINTS))


def test_changes_start_from_the_base() -> None:
    assert changes(KNOBS[2]) == [Change("c", "2", "1")]
    assert [str(change) for change in changes(KNOBS[1])] == ["b: x → y", "b: x → z", "b: y → z"]


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    rng, hits, total = random.Random(0), 0, 0
    truth = fit(POINTS, [value(p) for p in POINTS], KNOBS).main
    for _ in range(200):
        repeated = [p for p in POINTS for _ in range(3)]
        found = fit(repeated, [value(p) + rng.gauss(0, 0.7) for p in repeated], KNOBS)
        for change, size in found.main.items():
            hits += size.low <= truth[change].value <= size.high
            total += 1
    assert 0.93 < hits / total < 0.97


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tell 10 effects apart"):
        fit(POINTS[:6], [value(p) for p in POINTS[:6]], KNOBS)


def test_intervals_over_seeds_hold_for_other_seeds() -> None:
    """Seeds suit the choices of b differently: intervals of two seeds' residuals would miss its effects most of the
    time."""
    rng, hits, narrow, total = random.Random(0), 0, 0, 0
    truth = fit(POINTS, [value(p) for p in POINTS], KNOBS).main
    points = [p for p in POINTS for _ in range(3)]
    on_b = [Change("b", "x", "y"), Change("b", "x", "z")]
    for _ in range(200):
        scores: list[dict[int, float]] = [{} for _ in points]
        for seed in range(6):
            common, slopes = rng.gauss(0, 1), (0.0, rng.gauss(0, 1), rng.gauss(0, 1))
            for i, p in enumerate(points):
                if seed < 2 or i % 2:
                    scores[i][seed] = value(p) + common + slopes[p["b"]] + rng.gauss(0, 0.3)
        found = fit_over_seeds(points, scores, KNOBS)
        few = fit(points, [(s[0] + s[1]) / 2 for s in scores], KNOBS)
        for change in on_b:
            hits += found.main[change].low <= truth[change].value <= found.main[change].high
            narrow += few.main[change].low <= truth[change].value <= few.main[change].high
            total += 1
    assert narrow / total < 0.5
    assert 0.92 < hits / total < 0.98


def test_seeds_that_all_architectures_have_are_needed() -> None:
    few = [{0: value(p), 1: value(p)} for p in POINTS]
    found = fit_over_seeds(POINTS, few, KNOBS).main[Change("a", "off", "on")]
    assert (found.low, found.high) == pytest.approx((3, 3)), "seeds that agree exactly"
    with pytest.raises(ValueError, match="no seed in common"):
        fit_over_seeds(POINTS, [{i % 2: value(p)} for i, p in enumerate(POINTS)], KNOBS)


def test_the_chance_of_a_sign_is_that_of_simulated_experiments() -> None:
    rng = random.Random(1)
    noise, between, mean = 1.0, 0.5, -0.8
    true = [rng.gauss(mean, between) for _ in range(4000)]
    observed = [[t + rng.gauss(0, noise) for _ in range(2)] for t in true]
    for seeds in (1, 3):
        repeated = [t + rng.gauss(0, noise / seeds**0.5) < 0 for t in true]
        expected = sum(repeated) / len(repeated)
        assert chance_of_sign(observed, seeds=seeds) == pytest.approx(expected, abs=0.03)
    assert chance_of_sign([[-1.0], [-1.0]], seeds=1) == 1
