"""Repetition of a timed run until its times reach a steady state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from snapgen.config import Config

AGREEING_BLOCKS = 3
"""Number of consecutive blocks that must agree to end the warm-up."""

MIN_BLOCKS = 6
"""Fewest blocks after the warm-up. The range of n values contains the true median with probability 1 − 2^(1−n): 97 %
for six values, 94 % for five."""

DEVIATIONS_95 = 1.96
"""Half width of a normal distribution's 95 % interval, in standard deviations."""


class SteadyStateConfig(Config):
    """Rule for the number of repetitions; see `time_until_steady`."""

    block_seconds: float = Field(default=0.05, gt=0, le=60)
    """Approximate duration of a block of runs."""
    agreement: float = Field(default=0.05, gt=0, le=1)
    """Relative difference of the medians of consecutive blocks that ends the warm-up."""
    precision: float = Field(default=0.03, gt=0, le=1)
    """Relative half width of the median's 95 % interval at which the times count as steady."""
    seconds: float = Field(default=4, gt=0, le=3600)
    """Time limit."""


@dataclass(frozen=True)
class RunTimes:
    """Times of the runs after the warm-up, in seconds, in order."""

    runs: tuple[float, ...]
    steady: bool

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        lower, median, upper = np.percentile(self.runs, [25, 50, 75])
        return float(lower), float(median), float(upper)

    def fields(self) -> dict[str, Any]:
        """The fields of a measured `archsearch.score.LatencyRecord` that the times determine."""
        lower, median, upper = (seconds * 1e3 for seconds in self.quartiles())
        times = {"lower_quartile_ms": lower, "median_ms": median, "upper_quartile_ms": upper}
        return {**times, "runs": len(self.runs), "steady": self.steady, "source": "measured"}


def time_until_steady(
    run: Callable[[], float], rule: SteadyStateConfig, *, clock: Callable[[], float] = time.perf_counter
) -> RunTimes:
    """Repeat ``run`` until its times are in a steady state.

    The first run is discarded. The others are grouped into blocks of about ``block_seconds`` with at least one run
    each, represented by their median, which is robust to single disturbed runs. Blocks count as warm-up and are
    discarded until three consecutive medians lie within ``agreement`` of each other (relative). The times are steady
    once there are six blocks after the warm-up and the 95 % interval of the median over them lies within ``precision``
    of it on both sides. The interval uses order statistics of the blocks' medians, because runs of one block are not
    independent. After ``seconds``, but not before three blocks, the repetition stops; the result counts as steady if
    the interval is that narrow. If the medians never agreed, the first half of the blocks is discarded.

    Args:
        run: runs once and returns its duration in seconds.
        rule: block duration, thresholds and time limit.
        clock: current time in seconds, for the time limit.
    """
    start = clock()
    run()
    size = max(1, round(rule.block_seconds / max(run(), 1e-6)))
    blocks: list[list[float]] = []
    medians: list[float] = []
    warm: int | None = None  # number of warm-up blocks, once known
    while True:
        blocks.append([run() for _ in range(size)])
        medians.append(float(np.median(blocks[-1])))
        last = medians[-AGREEING_BLOCKS:]
        if warm is None and len(last) == AGREEING_BLOCKS and max(last) <= min(last) * (1 + rule.agreement):
            warm = len(blocks) - AGREEING_BLOCKS
        precise = warm is not None and _precise(medians[warm:], rule.precision)
        enough = warm is not None and len(blocks) - warm >= MIN_BLOCKS
        late = clock() - start >= rule.seconds and len(blocks) >= AGREEING_BLOCKS
        if late or (precise and enough):
            steady_blocks = blocks[len(blocks) // 2 if warm is None else warm :]
            return RunTimes(tuple(seconds for block in steady_blocks for seconds in block), steady=precise)


def _precise(medians: Sequence[float], tolerance: float) -> bool:
    low, high = median_interval(medians)
    median = float(np.median(medians))
    return median * (1 - tolerance) <= low and high <= median * (1 + tolerance)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median of independent values by order statistics; the range for fewer than six values."""
    ordered = sorted(values)
    n = len(ordered)
    # rank below the median by the normal approximation of the binomial distribution, rounded outwards
    below = max(0, int(n / 2 - DEVIATIONS_95 * n**0.5 / 2))
    return ordered[below], ordered[n - 1 - below]
