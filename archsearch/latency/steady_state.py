"""When a repeated run's times have settled, and what they settled on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from snapgen.config import Config

AGREEING_BLOCKS = 3
# The range of n values holds their median's true value with probability 1 − 2^(1−n): 97 % for six, 94 % for five.
FEWEST_BLOCKS = 6
DEVIATIONS_95 = 1.96


class SteadyStateConfig(Config):
    """Until when a run is repeated; see `time_until_steady`."""

    block_seconds: float = Field(default=0.05, gt=0, le=60)
    agreement: float = Field(default=0.05, gt=0, le=1)
    precision: float = Field(default=0.03, gt=0, le=1)
    seconds: float = Field(default=4, gt=0, le=3600)


@dataclass(frozen=True)
class RunTimes:
    """The times of the runs that count, in seconds, in their order."""

    runs: tuple[float, ...]
    steady: bool

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        lower, median, upper = np.percentile(self.runs, [25, 50, 75])
        return float(lower), float(median), float(upper)


def time_until_steady(
    run: Callable[[], float], rule: SteadyStateConfig, *, clock: Callable[[], float] = time.perf_counter
) -> RunTimes:
    """Repeat ``run`` until its times are in a steady state.

    The first run never counts. The others are grouped into blocks of about ``block_seconds``, at least one run each,
    and a block is known by its median, which a run that was disturbed does not move. Blocks are warm-up, and dropped,
    until three in a row have medians within ``agreement`` of each other (relative). The times are steady once there
    are six blocks since, and the 95 % interval of the median over them (order statistics of the blocks' medians: runs
    of one block are not independent) lies within ``precision`` of it on both sides. After ``seconds`` it ends as it
    is, though not before three blocks: steady if what there is lies that close, otherwise not. Times that never
    agreed are reported without their first half.

    Args:
        run: runs once and returns its seconds.
        clock: seconds, for the limit.
    """
    began = clock()
    run()
    size = max(1, round(rule.block_seconds / max(run(), 1e-6)))
    blocks: list[list[float]] = []
    medians: list[float] = []
    warm: int | None = None
    while True:
        blocks.append([run() for _ in range(size)])
        medians.append(float(np.median(blocks[-1])))
        if warm is None and _agree(medians[-AGREEING_BLOCKS:], rule.agreement):
            warm = len(blocks) - AGREEING_BLOCKS
        precise = warm is not None and _precise(medians[warm:], rule.precision)
        enough = warm is not None and len(blocks) - warm >= FEWEST_BLOCKS
        late = clock() - began >= rule.seconds and len(blocks) >= AGREEING_BLOCKS
        if late or (precise and enough):
            kept = blocks[len(blocks) // 2 if warm is None else warm :]
            return RunTimes(tuple(seconds for block in kept for seconds in block), steady=precise)


def _agree(medians: Sequence[float], within: float) -> bool:
    return len(medians) == AGREEING_BLOCKS and max(medians) <= min(medians) * (1 + within)


def _precise(medians: Sequence[float], within: float) -> bool:
    low, high = median_interval(medians)
    median = float(np.median(medians))
    return median * (1 - within) <= low and high <= median * (1 + within)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median of independent values, by order statistics; of fewer than six, their range."""
    ordered = sorted(values)
    n = len(ordered)
    # The rank below the median that the normal approximation of the binomial gives, rounded outwards.
    below = max(0, int(n / 2 - DEVIATIONS_95 * n**0.5 / 2))
    return ordered[below], ordered[n - 1 - below]
