from __future__ import annotations

import numpy as np
import pytest

from archsearch.score import Estimate
from reports.agreement import agreement, spearman


def estimate(value: float, half: float, *seeds: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, by_seed=seeds)


def test_spearman_by_hand() -> None:
    # d² = 1 + 1 + 0 + 0 + 0: 1 − 6·2 / (5·24) = 0.9
    found = spearman([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])
    assert found is not None
    assert found.value == pytest.approx(0.9)
    assert found.low <= 0.9 <= found.high <= 1


def test_spearman_agrees_with_scipy_on_ties() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = (rng.integers(5, size=20).astype(float).tolist() for _ in range(2))
    found = spearman(a, b)
    assert found is not None
    assert found.value == pytest.approx(spearmanr(a, b).statistic)


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([], [])])
def test_spearman_declines(a: list[float], b: list[float]) -> None:
    assert spearman(a, b) is None


def test_agreement_counts_pairs_that_differ() -> None:
    found = agreement([estimate(v, 0.1, v - 0.01, v + 0.01) for v in (0.0, 0.15, 1.0, 2.0)])
    assert found.n == 4
    assert found.rho is not None
    assert found.rho.value == 1
    assert found.apart == pytest.approx(5 / 6)
    assert found.spread == pytest.approx(float(np.std([0, 0.15, 1, 2], ddof=1)) / 0.1)


def test_agreement_of_one_seed_or_one_candidate() -> None:
    assert agreement([estimate(v, 0.1, v) for v in (0, 1, 2, 3)]).rho is None
    alone = agreement([estimate(1, 0.1, 1, 1)])
    assert (alone.rho, alone.apart, alone.spread) == (None, None, None)
    assert agreement([]).n == 0
