"""Latency prediction from a net's operations."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.predictor.backend import PredictedBackend, load_latency_model
    from archsearch.predictor.model import LatencyModel, LatencyPrediction, fit_latency_model
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["LatencyModel", "LatencyPrediction", "PredictedBackend", "fit_latency_model", "load_latency_model"]
