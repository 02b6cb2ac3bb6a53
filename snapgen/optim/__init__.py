"""Optimizers, learning-rate schedules and the EMA of weights."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.optim.config import OptimizerConfig, build_optimizers
    from snapgen.optim.ema import EMA
    from snapgen.optim.muon import Muon
    from snapgen.optim.schedule import cosine_with_warmup
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["EMA", "Muon", "OptimizerConfig", "build_optimizers", "cosine_with_warmup"]
