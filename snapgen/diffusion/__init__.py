"""Noise processes, prediction types and sampling."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from snapgen.diffusion.process import (
        NoiseProcess as NoiseProcess,
        PredictionType as PredictionType,
        RectifiedFlow as RectifiedFlow,
        VariancePreserving as VariancePreserving,
        make_process as make_process,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
