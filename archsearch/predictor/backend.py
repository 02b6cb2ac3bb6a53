"""A latency backend that predicts by a fitted model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from archsearch.cost.operations import operations
from archsearch.predictor.model import Model, Prediction
from archsearch.score import LatencyRecord
from snapgen import config as settings
from snapgen.architecture.schema import Architecture
from snapgen.config import Settings
from snapgen.errors import InputError


class Predicted:
    """A backend that runs nothing: it predicts by a model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `archsearch.latency.base.Backend.measure`."""
        return self.model.record(self.predict(arch, latent_size, context_tokens))

    def predict(self, arch: Architecture, latent_size: int, context_tokens: int) -> Prediction:
        """What is behind the record of `measure`."""
        return self.model.predict(operations(arch, latent_size, context_tokens=context_tokens))


class PredictedSettings(Settings):
    """What a study may say beside the device's name; a model was fitted under settings of its own."""

    threads: int | None = Field(default=None, ge=1)


def predicted(device: str, options: Mapping[str, Any]) -> Predicted:
    """The backend of a shipped profile's name, or of a file that ``archsearch latency fit`` wrote.

    Raises:
        InputError: if it is neither, or the options are not those that it was fitted under.
    """
    model = find(device)
    threads = settings.parse(dict(options), PredictedSettings, source="latency").threads
    if None not in (threads, model.threads) and threads != model.threads:
        problem = f"{device} predicts {model.threads} threads, not {threads}"
        raise InputError("latency", problem, f"say threads: {model.threads}, or fit a model to such records")
    return Predicted(model)


def find(device: str) -> Model:
    """A shipped profile's model by its name, or one's own by its path.

    Raises:
        InputError: if there is none.
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
    return Model.load(path)
