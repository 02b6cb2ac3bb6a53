"""Noise processes, prediction types and sampling."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.diffusion.process import NoiseProcess, PredictionType, RectifiedFlow, VariancePreserving, make_process
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["NoiseProcess", "PredictionType", "RectifiedFlow", "VariancePreserving", "make_process"]
