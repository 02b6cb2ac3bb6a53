"""Learning-rate schedules."""

from __future__ import annotations

import math

from snapgen.optim.config import OptimizerConfig


def cosine_with_warmup(step: int, *, steps: int, warmup: int) -> float:
    """Learning rate of a step, counted from 0, relative to its peak: linear warmup, then a cosine to 0.01."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def lr_scale(step: int, config: OptimizerConfig, steps: int) -> float:
    """Learning rate of a step, counted from 1 to ``steps``, relative to its peak."""
    warmup = round(config.warmup_fraction * steps)
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if config.lr_schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0 if config.lr_schedule == "constant" else 1 - done
