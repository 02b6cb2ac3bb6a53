"""Learning-rate schedules."""

from __future__ import annotations

import math

from snapgen.optim.config import OptimizerConfig


def cosine_with_warmup(step: int, *, steps: int, warmup: int) -> float:
    """The share of the learning rate of a step, from 0: linear warm-up, then a cosine to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def lr_scale(step: int, settings: OptimizerConfig, steps: int) -> float:
    """The learning rate of a step (1 to ``steps``) over its peak."""
    rising = round(settings.warmup * steps)
    if step <= rising:
        return step / (rising + 1)
    done = (step - 1 - rising) / max(1, steps - rising)
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0 if settings.schedule == "constant" else 1 - done
