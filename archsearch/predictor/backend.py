"""Latency backend that predicts with a fitted model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from archsearch.cost.operations import operations
from archsearch.predictor.model import LatencyModel, LatencyPrediction
from archsearch.score import LatencyRecord
from snapgen import config
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.errors import InputError


class PredictedBackend:
    """Latency backend that predicts with a model instead of measuring."""

    def __init__(self, model: LatencyModel) -> None:
        self.model = model

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `archsearch.latency.base.Backend.measure`."""
        return self.model.record(self.predict(arch, latent_size, context_tokens))

    def predict(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyPrediction:
        """The prediction, with its intervals, that the record of `measure` is made of."""
        return self.model.predict(operations(arch, latent_size, context_tokens=context_tokens))


class PredictedConfig(Config):
    """Options of a predicted device. They must agree with the conditions that the model was fitted under."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads; must be those that the model was fitted under."""


def predicted_backend(device: str, options: Mapping[str, Any]) -> PredictedBackend:
    """Build the backend of a shipped profile, by name, or of a file written by ``archsearch latency fit``.

    Raises:
        InputError: if it is neither, or the options differ from the conditions that the model was fitted under.
    """
    model = load_latency_model(device)
    threads = config.parse_config(dict(options), PredictedConfig, source="latency").threads
    if None not in (threads, model.threads) and threads != model.threads:
        problem = f"{device} predicts {model.threads} threads, not {threads}"
        raise InputError("latency", problem, f"set threads: {model.threads}, or fit a model to such records")
    return PredictedBackend(model)


def model_behind(record: LatencyRecord, device: str) -> LatencyModel | None:
    """The model that predicted a latency on ``device`` (``predicted:NAME``); None if it is gone or was fitted again."""
    try:
        model = load_latency_model(device.removeprefix("predicted:"))
    except InputError:
        return None
    return model if record.source == "predicted" and model.runtime_name == record.runtime else None


def load_latency_model(device: str) -> LatencyModel:
    """Load the model of a shipped profile, by name, or a model file, by path.

    Raises:
        InputError: if it does not exist.
    """
    from archsearch.predictor import profiles

    if device in profiles.NAMES:
        return profiles.model(device)
    path = Path(device)
    if not path.suffix and not path.exists():
        names = ", ".join(f"predicted:{name}" for name in profiles.NAMES)
        raise InputError(
            f"predicted:{device}", "is neither a profile nor a file", f"use {names} or predicted:FILE.json"
        )
    return LatencyModel.load(path)
