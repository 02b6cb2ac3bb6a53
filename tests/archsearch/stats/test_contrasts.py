from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from archsearch.stats import contrasts, intervals
from archsearch.stats.contrasts import SeedTable
from archsearch.stats.estimate import Estimate


def table(values: Sequence[Sequence[float]], nets: Sequence[str] | None = None) -> SeedTable:
    rows = {f"row {i}": intervals.mean_over_seeds(list(v), 0.0) for i, v in enumerate(values)}
    return SeedTable(rows, dict(zip(rows, nets, strict=True)) if nets else None)


def half(estimate: Estimate) -> float:
    return estimate.high - estimate.value


def test_what_a_seed_does_to_all_rows_cancels() -> None:
    rng = np.random.default_rng(0)
    values = 10 * rng.normal(size=3) + 0.1 * rng.normal(size=(20, 3))
    change = table(values.tolist()).difference("row 1", "row 0")
    assert change.value == pytest.approx(values[1].mean() - values[0].mean())
    assert change.by_seed == pytest.approx(values[1] - values[0])
    assert half(change) == pytest.approx(2.02 * 0.1 * (2 / 3) ** 0.5, rel=0.3)


def test_without_shared_nets_the_means_are_those_of_pooled_candidates() -> None:
    values = np.random.default_rng(0).normal(size=(9, 3)).tolist()
    rows = table(values)
    assert not rows.uneven
    pooled = intervals.pool_intervals(list(rows.rows.values()))
    for name, expected in zip(rows.rows, pooled, strict=True):
        assert (rows.mean(name).low, rows.mean(name).high) == pytest.approx((expected.low, expected.high))


def test_rows_of_one_net_are_not_pooled_as_if_they_were_independent() -> None:
    """Six rows of two nets that hardly differ within a net: there are two nets to compare, not six rows."""
    nets = np.array([[0.0, 1.0, 0.2], [1.0, 0.1, 0.9]])
    values = np.repeat(nets, 3, axis=0) + 1e-3 * np.random.default_rng(2).normal(size=(6, 3))
    of_nets = table(values.tolist(), ["a"] * 3 + ["b"] * 3)
    alone = table(nets.tolist())
    between, own = of_nets.difference("row 3", "row 0"), alone.difference("row 1", "row 0")
    assert half(between) == pytest.approx(half(own), rel=0.02), "one degree of freedom for each net and seed"
    as_rows = table(values.tolist()).difference("row 3", "row 0")
    assert half(as_rows) < half(between) / 1.5, "what six independent rows would be"
    assert half(of_nets.difference("row 1", "row 0")) < 0.01, "what a seed does to a net cancels between its rows"
    assert half(of_nets.mean("row 0")) > 0.5, "and is part of each row's own interval"


def test_rows_that_evaluate_one_net_alike_have_exactly_no_difference() -> None:
    of_nets = table([[1.0, 2.0], [1.0, 2.0], [3.0, 1.0]], ["a", "a", "b"])
    change = of_nets.difference("row 1", "row 0")
    assert (change.low, change.value, change.high) == (0, 0, 0)
    assert intervals.verdict(change) == "cannot tell"


def test_a_net_of_larger_spread_has_intervals_of_its_own() -> None:
    rng = np.random.default_rng(3)
    values = 0.1 * rng.normal(size=(12, 3))
    values[0] = [-3.0, 0.0, 3.5]
    rows = table(values.tolist())
    assert rows.uneven == ("row 0",)
    difference = rows.difference("row 1", "row 0")
    assert half(difference) == pytest.approx(half(intervals.mean_over_seeds(list(difference.by_seed), 0.0)))
    pooled = half(rows.difference("row 2", "row 1"))
    assert half(difference) > 3 * pooled
    assert half(rows.mean("row 0")) > 3 * half(rows.mean("row 1"))


def test_verdicts_at_once_are_stricter() -> None:
    rows = table(np.random.default_rng(4).normal(size=(5, 3)).tolist())
    alone = rows.difference("row 1", "row 0")
    together = rows.difference("row 1", "row 0", confidence=contrasts.at_once(20))
    assert contrasts.at_once(1) == 0.95
    assert contrasts.at_once(20) == pytest.approx(0.9975)
    assert half(together) > 1.4 * half(alone)


def test_a_contrast_weighs_rows_and_a_single_net_has_its_own_spread() -> None:
    rows = table([[1.0, 2.0], [2.0, 4.0], [0.0, 1.0]])
    assert rows.contrast({"row 0": 1, "row 1": -0.5, "row 2": -0.5}).value == pytest.approx(1.5 - 1.75)
    with pytest.raises(AssertionError, match="add up to 0"):
        rows.contrast({"row 0": 1})
    one = table([[1.0, 2.0, 3.0]])
    assert half(one.mean("row 0")) == pytest.approx(half(intervals.mean_over_seeds([1.0, 2.0, 3.0], 0.0)))
