from __future__ import annotations

import math
import random

import pytest

from archsearch.stats.medians import median


def test_a_median_has_its_interval() -> None:
    assert median([3.0, 1.0, 2.0, 4.0, 6.0, 5.0]) == (3.5, 1, 6)
    assert median([float(i) for i in range(1, 31)]) == (15.5, 10, 21)  # of binomial tables for n = 30


def test_infinite_values_are_the_largest() -> None:
    assert median([1.0, 2.0, 3.0, 4.0, 5.0, math.inf]) == (3.5, 1, math.inf)
    assert median([1.0, math.inf, math.inf]).value == math.inf
    assert median([math.inf] * 6) == (math.inf, math.inf, math.inf)


def test_fewer_than_six_values_have_no_interval() -> None:
    found = median([2.0, 1.0, 3.0, 5.0, 4.0])
    assert (found.value, math.isnan(found.low), math.isnan(found.high)) == (3, True, True)


def test_the_interval_contains_the_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    found = [median([rng.expovariate(1) for _ in range(30)]) for _ in range(2000)]
    assert sum(m.low <= math.log(2) <= m.high for m in found) / len(found) == pytest.approx(0.957, abs=0.02)
