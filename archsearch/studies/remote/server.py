"""Server of a device: claims waiting measurements in a storage, makes them and stores the records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import RDBStorage

from archsearch.devices import backend
from archsearch.latency.base import Backend, DeviceLostError, MeasurementError
from archsearch.machine_faults import machine_fault
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec, requested_specs
from archsearch.studies.signals import raise_if_terminated, terminable
from archsearch.studies.storage.database import database_errors, open_storage, storage_errors
from archsearch.studies.storage.leases import heartbeat
from archsearch.studies.storage.record import MeasurementRecord
from snapgen.errors import InputError, first_line

POLL_SECONDS = 1.0

BackendFactory = Callable[[str, Mapping[str, Any]], Backend]


def serve(
    url: str,
    device: str,
    options: Mapping[str, Any],
    *,
    log: Callable[[str], None],
    idle_seconds: float | None = None,
    make: BackendFactory = lambda device, options: backend(device, **options),
) -> int:
    """Measure what searches request from a device, until interrupted or idle for ``idle_seconds``.

    Several processes may serve one storage. If one dies, its measurement returns to the queue: at once for processes on
    the same machine, for others when its heartbeat has stopped.

    Args:
        url: Optuna URL of the storage.
        device: kind of device, e.g. ``iphone``.
        options: options of this machine, such as a signing team; they override those that a search requests.
        log: called with each line for the user.
        idle_seconds: time without measurements after which to return; None: serve until interrupted.
        make: builds the backend of a device from its options.

    Returns:
        Number of measurements made.

    Raises:
        InputError: if the storage or the device cannot be used, or the device was lost.
        KeyboardInterrupt: after the running measurement has been returned to the queue.
    """
    with storage_errors(url), terminable():
        storage = open_storage(url)
        server = _Server(storage, device, options, log, make)
        # Fail now, before anything waits, if the device cannot be used.
        server.backend(MeasurementSpec(device, 1, 1, {}))
        log(f"serving {device} for {url.rpartition('@')[2]}")
        idle_since = time.monotonic()
        while idle_seconds is None or time.monotonic() - idle_since < idle_seconds:
            raise_if_terminated()
            if server.serve_one():
                idle_since = time.monotonic()
            else:
                time.sleep(POLL_SECONDS)
        return server.num_measured


@dataclass
class _Server:
    storage: RDBStorage
    device: str
    options: Mapping[str, Any]
    log: Callable[[str], None]
    make: BackendFactory
    backends: dict[str, Backend] = field(default_factory=dict)
    queues: dict[str, MeasurementQueue] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    num_measured: int = 0

    def backend(self, spec: MeasurementSpec) -> Backend:
        if spec.name not in self.backends:
            self.backends[spec.name] = self.make(self.device, {**spec.options, **self.options})
        return self.backends[spec.name]

    def serve_one(self) -> bool:
        """Make one measurement; False if none waits."""
        for spec in requested_specs(self.storage, self.device, damaged=self._log_once):
            queue = self.queues.get(spec.name) or MeasurementQueue(self.storage, spec)
            self.queues[spec.name] = queue
            for line in queue.refuse_damaged():
                self.log(line)
            for number in queue.reap_dead():
                self.log(f"measurement {number}: its device died; it is queued again")
            if claimed := queue.claim():
                self._measure(queue, spec, claimed)
                return True
        return False

    def _log_once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.log(line)

    def _measure(self, queue: MeasurementQueue, spec: MeasurementSpec, claimed: MeasurementRecord) -> None:
        name = f"measurement {claimed.number} ({claimed.architecture.id})"
        try:
            with heartbeat(self.storage, claimed.trial_id):
                record = self.backend(spec).measure(claimed.architecture, spec.latent_size, spec.context_tokens)
        except DeviceLostError as error:
            queue.release(claimed)
            raise InputError(self.device, f"{error}; {name} is queued again", error.remedy) from None
        except database_errors():
            raise
        except Exception as error:
            if (fault := machine_fault(error)) is not None:
                queue.release(claimed)
                raise fault from error
            # Whatever else it raises: it would do so at every start, and keep the requests behind it waiting.
            told = isinstance(error, MeasurementError | InputError)
            reason = str(error) if told else f"{type(error).__name__}: {first_line(error)}"
            queue.reject(claimed, reason)
            self.log(f"{name}: {reason}")
        except BaseException:
            queue.release(claimed)
            raise
        else:
            stored = queue.complete(claimed, record)
            self.num_measured += stored
            ms = f"{record.median_ms:.4g} ms"
            self.log(f"{name}: {ms}" + ("" if stored else ", dropped: another device has claimed it"))
