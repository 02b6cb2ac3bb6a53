from __future__ import annotations

import numpy as np
import pytest

from archsearch.reports.study.seed_agreement import agreement
from archsearch.stats.estimate import Estimate


def estimate(value: float, half: float, *seeds: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, by_seed=seeds)


def test_agreement_counts_pairs_that_differ() -> None:
    found = agreement([estimate(v, 0.1, v - 0.01, v + 0.01) for v in (0.0, 0.15, 1.0, 2.0)])
    assert found.n == 4
    assert found.rho is not None
    assert found.rho.rho == 1
    assert found.apart == pytest.approx(5 / 6)
    assert found.spread == pytest.approx(float(np.std([0, 0.15, 1, 2], ddof=1)) / 0.1)


def test_agreement_of_one_seed_or_one_candidate() -> None:
    assert agreement([estimate(v, 0.1, v) for v in (0, 1, 2, 3)]).rho is None
    alone = agreement([estimate(1, 0.1, 1, 1)])
    assert (alone.rho, alone.apart, alone.spread) == (None, None, None)
    assert agreement([]).n == 0
