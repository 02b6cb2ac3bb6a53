from __future__ import annotations

import numpy as np
import pytest

from archsearch.reports.study.seed_agreement import seed_agreement
from archsearch.stats.estimate import Estimate


def estimate(value: float, half: float, *seeds: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, by_seed=seeds)


def test_agreement_counts_pairs_that_differ() -> None:
    agreement = seed_agreement([estimate(v, 0.1, v - 0.01, v + 0.01) for v in (0.0, 0.15, 1.0, 2.0)])
    assert agreement.n == 4
    assert agreement.rho is not None
    assert agreement.rho.value == 1
    assert agreement.separable == pytest.approx(5 / 6)
    assert agreement.spread == pytest.approx(float(np.std([0, 0.15, 1, 2], ddof=1)) / 0.1)


def test_agreement_of_one_seed_or_one_candidate() -> None:
    assert seed_agreement([estimate(v, 0.1, v) for v in (0, 1, 2, 3)]).rho is None
    single = seed_agreement([estimate(1, 0.1, 1, 1)])
    assert (single.rho, single.separable, single.spread) == (None, None, None)
    assert seed_agreement([]).n == 0
