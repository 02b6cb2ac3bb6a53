"""Rank correlation with an interval, optionally controlling for a third quantity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import CONFIDENCE

Array = NDArray[np.float64]

FIT = 0.5
"""A score is fit to rank if the whole interval of its agreement with the long run lies above this."""

MIN_CANDIDATES = 4
"""Fewest candidates for which a rank correlation is computed."""


def spearman(a: Sequence[float], b: Sequence[float], control: Sequence[float] | None = None) -> Estimate | None:
    """Spearman's rank correlation of ``a`` and ``b``; with ``control``, their partial rank correlation.

    The partial rank correlation is the correlation of the residuals of the ranks of ``a`` and ``b`` after linear
    regression on the ranks of ``control``.

    The interval is Fisher's, atanh ρ ± z √((1 + ρ²) / (n − 3)), with one candidate less where there is a control.
    Bonett and Wright (2000, Psychometrika 65) have ρ² / 2, which covers too little where the ranks nearly agree, as a
    bootstrap of few candidates does everywhere. Ranks that agree entirely count as half a step less; a step is the
    smallest difference between two correlations of n candidates.

    Returns:
        The correlation with its interval; None for fewer than `MIN_CANDIDATES` candidates, or without rank variance.
    """
    columns = np.array([a, b] if control is None else [a, b, control], dtype=np.float64)
    if columns.shape[1] < MIN_CANDIDATES:
        return None
    rho = float(rank_correlation(columns))
    if math.isnan(rho):
        return None
    low, high = interval(rho, columns.shape[1], controls=len(columns) - 2)
    return Estimate(value=rho, low=low, high=high)


def interval(rho: float, count: int, *, controls: int = 0) -> tuple[float, float]:
    """The 95 % interval of a rank correlation of ``count`` candidates; see `spearman`."""
    freedom = count - 3 - controls
    if freedom < 1:
        return -1.0, 1.0
    largest = 1 - 6 / (count * (count**2 - 1))
    rho = min(max(rho, -largest), largest)
    half = float(ndtri((1 + CONFIDENCE) / 2)) * math.sqrt((1 + rho**2) / freedom)
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def candidates_needed(rho: float, *, controls: int = 0) -> int | None:
    """Number of candidates of whom a rank correlation would show a score fit to rank; None if no number would."""
    if rho <= FIT:
        return None
    # The interval's formula, solved for the number; the largest correlation of few candidates may ask for some more.
    rho = min(rho, 0.999)
    steps = float(ndtri((1 + CONFIDENCE) / 2)) / (math.atanh(rho) - math.atanh(FIT))
    count = max(MIN_CANDIDATES, 3 + controls + math.ceil(steps**2 * (1 + rho**2)))
    while interval(rho, count, controls=controls)[0] <= FIT:
        count += 1
    return count


def rank_correlation(columns: Array) -> Array:
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
