"""Optimizers, learning-rate schedules and the EMA of weights."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.optim.config import OptimizerConfig as OptimizerConfig, build_optimizers as build_optimizers
    from snapgen.optim.ema import EMA as EMA
    from snapgen.optim.muon import Muon as Muon
    from snapgen.optim.schedule import cosine_with_warmup as cosine_with_warmup
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
