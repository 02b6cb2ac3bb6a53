"""The latency of candidates whose device is elsewhere: asked for before they are trained, and waited for."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from archsearch.devices import backend
from archsearch.latency.base import Backend
from archsearch.score import LatencyRecord
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from optuna import Study

    from archsearch.spaces.space import Space
    from archsearch.studies.config.study import LatencyConfig, StudyConfig

POLL_SECONDS = 0.5


class RemoteLatency:
    """Latency from devices that serve the study's storage (`archsearch.studies.remote.server`).

    While a measurement waits, the prediction that the study names stands for it, if it names one.
    """

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        from archsearch.studies.storage.database import open_storage

        self._settings = settings.latency
        self._space = space
        asked = order(settings.latency, space.latent_size, space.context_tokens)
        self._queue = MeasurementQueue(open_storage(settings.url, source=settings.source), asked)
        self._limit = settings.limits.get("latency_ms", math.inf)
        self._meanwhile: Backend | None = None
        if settings.latency.meanwhile is not None:
            self._meanwhile = backend(settings.latency.meanwhile)

    def first(self, arch: Architecture) -> LatencyRecord:
        """Ask for the measurement, and give it if it is made, else the prediction.

        Without a prediction, or where its interval does not tell which side of the study's limit the latency is on,
        the measurement is waited for.

        Raises:
            LatencyFailure: if the device refuses the architecture.
        """
        self._queue.request(arch)
        known = self._queue.answer(arch)
        if known is None and self._meanwhile is not None:
            predicted = self._meanwhile.measure(arch, self._space.latent_size, self._space.context_tokens)
            low, high = predicted.interval_ms or (predicted.median_ms, predicted.median_ms)
            if not low <= self._limit < high:
                return predicted
        return known or self._waited(arch)

    def settled(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        """What stands once the candidate is trained: the measurement, or the prediction if the study does not wait."""
        if first.source == "measured":
            return first
        known = self._queue.answer(arch)
        if known is None and self._settings.wait:
            return self._waited(arch)
        return known or first

    def _waited(self, arch: Architecture) -> LatencyRecord:
        while (record := self._queue.answer(arch)) is None:
            self._queue.bury()  # a device that died must not keep us waiting for another one to notice
            time.sleep(POLL_SECONDS)
        return record


def order(latency: LatencyConfig, latent_size: int, context_tokens: int) -> MeasurementSpec:
    """What a study asks of its remote device."""
    return MeasurementSpec(latency.device, latent_size, context_tokens, latency.backend_options)


def measured(study: Study) -> dict[str, LatencyRecord]:
    """What the remote device of a study has measured so far, by architecture id; nothing if it has none."""
    settings, space = study.user_attrs.get("settings", {}).get("latency", {}), study.user_attrs.get("space", {})
    if not settings.get("remote"):
        return {}
    from archsearch.studies.config.study import LatencyConfig

    asked = order(LatencyConfig.model_validate(settings), space["latent_size"], space["context_tokens"])
    return MeasurementQueue(study._storage, asked).records()  # type: ignore[arg-type]
