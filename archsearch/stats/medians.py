"""Medians with intervals that assume nothing of the distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TAIL = 0.025


class Median(NamedTuple):
    """A median with its 95 % interval; any of the three may be infinite, and the ends are NaN if there is none."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> Median:
    """Median of a sample, and the order statistics between which the distribution's lies with 95 % probability.

    With fewer than six values there is no such interval.
    """
    from scipy.stats import binom

    ranked, count = sorted(values), len(values)
    cut = int(binom.ppf(TAIL, count, 0.5))
    upper, lower = ranked[count // 2], ranked[(count - 1) // 2]
    # The mean of two infinities is no number.
    middle = upper if upper == lower else (upper + lower) / 2
    return Median(middle, ranked[cut - 1], ranked[count - cut]) if cut else Median(middle, math.nan, math.nan)
