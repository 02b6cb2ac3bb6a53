"""Latency prediction from a net's operations."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.predictor.backend import (
        PredictedBackend as PredictedBackend,
        load_latency_model as load_latency_model,
        model_behind as model_behind,
    )
    from archsearch.predictor.model import (
        LatencyModel as LatencyModel,
        LatencyPrediction as LatencyPrediction,
        fit_latency_model as fit_latency_model,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
