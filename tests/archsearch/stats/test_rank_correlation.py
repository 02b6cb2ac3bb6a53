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


def test_an_agreement_of_few_candidates_is_not_certain() -> None:
    """Of four candidates, one order in 24 agrees entirely by chance."""
    up = [1.0, 2.0, 3.0, 4.0]
    correlation = spearman(up, up)
    assert correlation is not None
    assert (correlation.value, correlation.high) == (1, 1)
    assert correlation.low < 0
    partial = spearman(up, [2.0, 1.0, 3.0, 4.0], control=[1.0, 4.0, 2.0, 3.0])
    assert partial is not None
    assert (partial.low, partial.high) == (-1, 1), "nothing is known of four candidates at equal compute"


@pytest.mark.parametrize(("count", "controls"), [(6, 0), (10, 0), (6, 1), (8, 1), (11, 1)])
def test_intervals_of_few_candidates_cover(count: int, controls: int) -> None:
    """A bootstrap of partial correlations of less than 12 candidates covers 80 %."""
    rng = np.random.default_rng(1)
    covariance = np.full((2 + controls, 2 + controls), 0.5) + 0.5 * np.eye(2 + controls)
    grades = 6 / np.pi * np.arcsin(covariance / 2)
    truth = grades[0, 1] if not controls else (grades[0, 1] - grades[0, 1] ** 2) / (1 - grades[0, 1] ** 2)
    columns = np.linalg.cholesky(covariance) @ rng.normal(size=(1500, len(covariance), count))
    found = [spearman(*map(list, draw)) for draw in columns]
    hits = [e.low <= truth <= e.high for e in found if e is not None]
    assert sum(hits) / len(hits) > 0.935


def test_returns_none_without_rank_variance() -> None:
    up = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spearman(up[:3], up[:3]) is None
    assert spearman(up, [1.0] * 5) is None
    assert spearman(up, [2.0, 1.0, 5.0, 3.0, 4.0], control=up) is None, "no variance is left"
