"""Rank correlation with an interval, optionally controlling for a third quantity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from archsearch.stats.estimate import Estimate
from snapgen.seeding import derive_seed

Array = NDArray[np.float64]

RESAMPLES = 2000
"""Number of bootstrap resamples."""

MIN_CANDIDATES = 4
"""Fewest candidates for which a rank correlation is computed."""


def spearman(a: Sequence[float], b: Sequence[float], control: Sequence[float] | None = None) -> Estimate | None:
    """Spearman's rank correlation of ``a`` and ``b``; with ``control``, their partial rank correlation.

    The partial rank correlation is the correlation of the residuals of the ranks of ``a`` and ``b`` after linear
    regression on the ranks of ``control``.

    Returns:
        The correlation, with the interval of a percentile bootstrap over the candidates; None for fewer than
        `MIN_CANDIDATES` candidates, or without rank variance.
    """
    columns = np.array([a, b] if control is None else [a, b, control], dtype=np.float64)
    if columns.shape[1] < MIN_CANDIDATES:
        return None
    rho = float(_rho(columns))
    if np.isnan(rho):
        return None
    rng = np.random.default_rng(derive_seed(0, "agreement"))
    resampled = rng.integers(columns.shape[1], size=(RESAMPLES, columns.shape[1]))
    low, high = np.nanquantile(_rho(columns[:, resampled]), (0.025, 0.975))  # (2 or 3, resamples, n) -> (resamples,)
    return Estimate(value=rho, low=float(low), high=float(high))


def _rho(columns: Array) -> Array:
    """Correlation of the ranks, (2 or 3, ..., n) -> (...); NaN if one side has no variance left."""
    from scipy.stats import rankdata

    ranks = rankdata(columns, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    a, b, *controls = ranks
    for control in controls:
        a, b = _residuals(a, control), _residuals(b, control)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.asarray((a * b).sum(-1) / np.where(scale > 1e-9, scale, np.nan))


def _residuals(ranks: Array, control: Array) -> Array:
    """Residuals of centered ranks after linear regression on the control's centered ranks."""
    square = (control**2).sum(-1, keepdims=True)
    slope = (ranks * control).sum(-1, keepdims=True) / np.where(square > 0, square, 1)
    residuals: Array = ranks - slope * control
    return np.where(np.abs(residuals) < 1e-9, 0, residuals)
