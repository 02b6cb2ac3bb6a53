from __future__ import annotations

import numpy as np
import pytest

from archsearch.spaces.summary import KnobSummary
from archsearch.stats.intervals import verdict
from archsearch.stats.main_effects import MIN_CANDIDATES, Effects, effects

FACTORS = [
    KnobSummary("attention", ("true", "false"), ordered=False),
    KnobSummary("convs", ("plain", "separable", "separable ×2"), ordered=False),
    KnobSummary("depth", ("1", "2", "3"), ordered=True),
    KnobSummary("rope", ("false", "true"), ordered=False),
]
TRUTH = {"attention": [0.0, 0.4], "convs": [0.0, -0.5, 0.0], "depth": [0.0, -0.2, -0.4], "rope": [0.0, 0.0]}


def simulated(seed: int, n: int, noise: float) -> tuple[list[dict[str, int]], list[float]]:
    rng = np.random.default_rng(seed)
    points = [{f.name: int(rng.integers(len(f.choices))) for f in FACTORS} for _ in range(n)]
    return points, [sum(TRUTH[k][i] for k, i in p.items()) + noise * float(rng.standard_normal()) for p in points]


def estimated(seed: int, n: int = 40, noise: float = 0.1) -> Effects:
    points, values = simulated(seed, n, noise)
    result = effects(points, values, FACTORS, relative=False)
    assert result is not None
    return result


def sizes(result: Effects) -> dict[str, tuple[float, float, float, bool]]:
    return {
        f"{knob.name}: {e.change}": (e.size.value, e.size.low, e.size.high, verdict(e.size) != "cannot tell")
        for knob in result.knobs
        for e in knob.effects
    }


TRUE_SIZES = {
    "attention: true → false": 0.4,
    "convs: plain → separable": -0.5,
    "convs: plain → separable ×2": 0.0,
    "depth: each step of 1 → 2 → 3": -0.2,
    "rope: false → true": 0.0,
}


def test_recovers_simulated_effects() -> None:
    result = estimated(0)
    assert sizes(result).keys() == TRUE_SIZES.keys()
    for change, (value, low, high, significant) in sizes(result).items():
        assert value == pytest.approx(TRUE_SIZES[change], abs=0.15)
        assert low < value < high
        assert significant or TRUE_SIZES[change] == 0
    assert {k.name for k in result.knobs[:2]} <= {"attention", "convs", "depth"}
    assert result.knobs[-1].name == "rope"
    assert result.explained > 0.7


def test_intervals_have_their_nominal_coverage() -> None:
    covered = [
        low <= TRUE_SIZES[change] <= high
        for seed in range(60)
        for change, (_, low, high, _) in sizes(estimated(seed, n=24, noise=0.3)).items()
    ]
    assert 0.91 <= np.mean(covered) <= 0.99


def test_intervals_cover_the_truth_with_more_columns_than_candidates() -> None:
    factors = [KnobSummary(f"k{i}", ("a", "b"), ordered=False) for i in range(16)]
    covered, significant = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=16) * (rng.random(16) < 0.3)
        points = [{f.name: int(rng.integers(2)) for f in factors} for _ in range(14)]
        values = [float(truth @ list(p.values())) + 0.3 * float(rng.standard_normal()) for p in points]
        result = effects(points, values, factors, relative=False)
        assert result is not None
        for knob in result.knobs:
            size, true = knob.effects[0].size, truth[int(knob.name[1:])]
            covered.append(size.low <= true <= size.high)
            significant += [true != 0] if verdict(size) != "cannot tell" else []
    assert 0.93 <= np.mean(covered) <= 0.99
    assert len(significant) > 20
    assert np.mean(significant) > 0.85


def test_noise_alone_is_not_significant() -> None:
    rng = np.random.default_rng(3)
    points, _ = simulated(3, 30, 0.1)
    significant = 0
    for _ in range(20):
        result = effects(points, list(rng.standard_normal(30)), FACTORS, relative=False)
        assert result is not None
        significant += sum(flag for *_, flag in sizes(result).values())
        assert all(knob.share.value < 0.3 for knob in result.knobs)
    assert significant <= 5  # of 100 intervals at 95 %


def test_more_columns_than_candidates() -> None:
    factors = [KnobSummary(f"k{i}", ("a", "b", "c", "d"), ordered=False) for i in range(6)]
    rng = np.random.default_rng(0)
    points = [{f.name: int(rng.integers(4)) for f in factors} for _ in range(10)]
    values = [2.0 * p["k0"] + 0.01 * float(rng.standard_normal()) for p in points]
    result = effects(points, values, factors, relative=False)
    assert result is not None
    assert result.knobs[0].name == "k0"


def test_two_perfectly_correlated_knobs_share_their_effect() -> None:
    rng = np.random.default_rng(1)
    factors = [*FACTORS[:1], KnobSummary("twin", ("true", "false"), ordered=False)]
    points = [{"attention": i, "twin": i} for i in rng.integers(2, size=30).tolist()]
    values = [p["attention"] + 0.05 * float(rng.standard_normal()) for p in points]
    result = effects(points, values, factors, relative=False)
    assert result is not None
    a, b = sizes(result).values()
    assert a[0] == pytest.approx(b[0], abs=0.2)
    assert a[2] - a[1] > 0.8  # the sum is well determined, the two effects are not


def test_relative_effects_are_ratios() -> None:
    points, values = simulated(5, 40, 0.02)
    result = effects(points, list(np.exp(values)), FACTORS, relative=True)
    assert result is not None
    assert sizes(result)["convs: plain → separable"][0] == pytest.approx(np.expm1(-0.5), abs=0.05)


def test_base_choice_is_what_changes_start_from() -> None:
    points, values = simulated(6, 40, 0.05)
    factors = [KnobSummary("convs", FACTORS[1].choices, ordered=False, base=2)]
    result = effects(points, values, factors, relative=False)
    assert result is not None
    assert [e.change for e in result.knobs[0].effects] == ["separable ×2 → plain", "separable ×2 → separable"]


def test_returns_none_without_enough_variation() -> None:
    points, values = simulated(0, MIN_CANDIDATES - 1, 0.1)
    assert effects(points, values, FACTORS, relative=False) is None
    points, values = simulated(0, 20, 0.1)
    assert effects(points, [1.5] * 20, FACTORS, relative=False) is None
    assert effects([points[0]] * 20, values, FACTORS, relative=False) is None


def test_a_knob_never_varied_is_named() -> None:
    points, values = simulated(0, 20, 0.1)
    result = effects([{**p, "rope": 1} for p in points], values, FACTORS, relative=False)
    assert result is not None
    assert result.constant == ("rope",)
    assert all(knob.name != "rope" for knob in result.knobs)


def test_same_input_same_report() -> None:
    assert estimated(2) == estimated(2)
