from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from archsearch.stats.rank_correlation import spearman

RNG = np.random.default_rng(0)


def test_equals_scipy_and_lies_in_its_interval() -> None:
    a = RNG.normal(size=30)
    b = a + RNG.normal(size=30)
    correlation = spearman(list(a), list(b))
    assert correlation is not None
    assert correlation.value == pytest.approx(spearmanr(a, b).statistic)
    assert -1 <= correlation.low <= correlation.value <= correlation.high <= 1
    assert correlation.low < correlation.high


def test_a_common_cause_is_removed() -> None:
    """Two scores that depend on compute only are correlated, but not at equal compute."""
    compute = RNG.normal(size=200)
    a, b = (list(compute + 0.3 * RNG.normal(size=200)) for _ in range(2))
    plain, partial = spearman(a, b), spearman(a, b, list(compute))
    assert plain is not None
    assert partial is not None
    assert plain.low > 0.8
    assert partial.low < 0 < partial.high or abs(partial.value) < 0.2


def test_partial_correlation_by_hand() -> None:
    """ρ(ab·c) = (ρab − ρac·ρbc) / √((1 − ρac²)(1 − ρbc²))."""
    a, b, c = RNG.normal(size=(3, 12))
    b, c = b + a, c + a
    ab, ac, bc = (spearmanr(x, y).statistic for x, y in ((a, b), (a, c), (b, c)))
    correlation = spearman(list(a), list(b), list(c))
    assert correlation is not None
    assert correlation.value == pytest.approx((ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)))


def test_returns_none_without_rank_variance() -> None:
    up = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spearman(up[:3], up[:3]) is None
    assert spearman(up, [1.0] * 5) is None
    assert spearman(up, [2.0, 1.0, 5.0, 3.0, 4.0], control=up) is None, "no variance is left"
