"""Rank correlation with an interval, whole or with another quantity held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snapgen.seeding import derive_seed

Array = NDArray[np.float64]

RESAMPLES = 2000
FEWEST = 4
"""Candidates under which a rank correlation says nothing."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation and its 95 % interval, a percentile bootstrap over the candidates."""

    rho: float
    low: float
    high: float


def spearman(a: Sequence[float], b: Sequence[float], given: Sequence[float] | None = None) -> Correlation | None:
    """The rank correlation of ``a`` and ``b``; with ``given``, their partial one, its ranks held.

    The partial one is the correlation of what is left of the ranks of ``a`` and of ``b`` after a straight line in the
    ranks of ``given`` is taken out.

    Returns:
        None if there are fewer than `FEWEST` candidates, or one side has nothing left to rank by.
    """
    columns = np.array([a, b] if given is None else [a, b, given], dtype=np.float64)
    if columns.shape[1] < FEWEST:
        return None
    rho = float(_rho(columns))
    if np.isnan(rho):
        return None
    rng = np.random.default_rng(derive_seed(0, "agreement"))
    again = rng.integers(columns.shape[1], size=(RESAMPLES, columns.shape[1]))
    low, high = np.nanquantile(_rho(columns[:, again]), (0.025, 0.975))
    return Correlation(rho, float(low), float(high))


def _rho(columns: Array) -> Array:
    """(2 or 3, ..., n) to (...); NaN where a side ties throughout, or is the given one over again."""
    from scipy.stats import rankdata

    ranks = rankdata(columns, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    a, b, *held = ranks
    for given in held:
        a, b = _without(a, given), _without(b, given)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.asarray((a * b).sum(-1) / np.where(scale > 1e-9, scale, np.nan))


def _without(ranks: Array, given: Array) -> Array:
    """What is left of centred ranks after their line in the given ones."""
    square = (given**2).sum(-1, keepdims=True)
    slope = (ranks * given).sum(-1, keepdims=True) / np.where(square > 0, square, 1)
    left: Array = ranks - slope * given
    return np.where(np.abs(left) < 1e-9, 0, left)
