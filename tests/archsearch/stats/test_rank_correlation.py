from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from archsearch.stats.rank_correlation import spearman

RNG = np.random.default_rng(0)


def test_is_scipys_and_lies_in_its_interval() -> None:
    a = RNG.normal(size=30)
    b = a + RNG.normal(size=30)
    found = spearman(list(a), list(b))
    assert found is not None
    assert found.rho == pytest.approx(spearmanr(a, b).statistic)
    assert -1 <= found.low <= found.rho <= found.high <= 1
    assert found.low < found.high


def test_a_common_cause_is_taken_out() -> None:
    """Two scores that follow compute and nothing else agree well, and not at equal compute."""
    compute = RNG.normal(size=200)
    a, b = (list(compute + 0.3 * RNG.normal(size=200)) for _ in range(2))
    whole, partial = spearman(a, b), spearman(a, b, list(compute))
    assert whole is not None
    assert partial is not None
    assert whole.low > 0.8
    assert partial.low < 0 < partial.high or abs(partial.rho) < 0.2


def test_the_partial_one_by_hand() -> None:
    """ρ(ab·c) = (ρab − ρac·ρbc) / √((1 − ρac²)(1 − ρbc²))."""
    a, b, c = RNG.normal(size=(3, 12))
    b, c = b + a, c + a
    ab, ac, bc = (spearmanr(x, y).statistic for x, y in ((a, b), (a, c), (b, c)))
    found = spearman(list(a), list(b), list(c))
    assert found is not None
    assert found.rho == pytest.approx((ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)))


def test_says_nothing_where_there_is_nothing_to_say() -> None:
    up = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spearman(up[:3], up[:3]) is None
    assert spearman(up, [1.0] * 5) is None
    assert spearman(up, [2.0, 1.0, 5.0, 3.0, 4.0], given=up) is None, "nothing is left of what is held itself"
