"""Latency of candidates from a remote device: requested before they are trained, and awaited."""

from __future__ import annotations

import math
import time

from optuna import Study

from archsearch.devices import backend
from archsearch.latency.base import Backend
from archsearch.score import LatencyRecord
from archsearch.spaces.space import Space
from archsearch.studies.config.study import LatencyConfig, StudyConfig
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec
from archsearch.studies.signals import raise_if_terminated
from archsearch.studies.storage.database import open_storage
from snapgen.architecture.schema import Architecture

POLL_SECONDS = 0.5


class RemoteLatency:
    """Latency from devices that serve the study's storage (`archsearch.studies.remote.server`).

    Until a measurement arrives, the study's ``latency.provisional`` prediction is used, if there is one.
    """

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self._settings = settings.latency
        self._space = space
        spec = measurement_spec(settings.latency, space.latent_size, space.context_tokens)
        self._queue = MeasurementQueue(open_storage(settings.url, source=settings.source), spec)
        self._limit = settings.constraints.get("latency_ms", math.inf)
        self._provisional: Backend | None = None
        if settings.latency.provisional is not None:
            self._provisional = backend(settings.latency.provisional)

    def request(self, arch: Architecture) -> LatencyRecord:
        """Request the measurement, and return it if it exists, else the provisional prediction.

        Without a prediction, or if the study's latency limit lies inside the prediction's interval, this waits for the
        measurement.

        Raises:
            MeasurementError: if the device cannot run the architecture.
        """
        self._queue.request(arch)
        measured = self._queue.answer(arch)
        if measured is None and self._provisional is not None:
            predicted = self._provisional.measure(arch, self._space.latent_size, self._space.context_tokens)
            low, high = predicted.interval_ms or (predicted.median_ms, predicted.median_ms)
            if not low <= self._limit < high:
                return predicted
        return measured or self._wait(arch)

    def final(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        """Latency of a trained candidate: the measurement, or the prediction if the study does not wait for it."""
        if first.source == "measured":
            return first
        measured = self._queue.answer(arch)
        if measured is None and self._settings.wait_for_measurement:
            return self._wait(arch)
        return measured or first

    def _wait(self, arch: Architecture) -> LatencyRecord:
        while (record := self._queue.answer(arch)) is None:
            # If the device died, requeue its measurement here rather than wait for another device to do so.
            self._queue.reap_dead()
            raise_if_terminated()
            time.sleep(POLL_SECONDS)
        return record


def measurement_spec(latency: LatencyConfig, latent_size: int, context_tokens: int) -> MeasurementSpec:
    """The measurement that a study requests from its remote device."""
    return MeasurementSpec(latency.device, latent_size, context_tokens, latency.backend_options)


def measured_latencies(study: Study) -> dict[str, LatencyRecord]:
    """Latency records that the remote device of a study has measured so far, by architecture id; empty without one."""
    settings, space = study.user_attrs.get("settings", {}).get("latency", {}), study.user_attrs.get("space", {})
    if not settings.get("remote"):
        return {}
    spec = measurement_spec(LatencyConfig.model_validate(settings), space["latent_size"], space["context_tokens"])
    return MeasurementQueue(study._storage, spec).records()  # type: ignore[arg-type]
