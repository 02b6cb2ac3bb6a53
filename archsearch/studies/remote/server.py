"""A device that serves searches: it takes waiting measurements from their storage, makes them, and tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from archsearch.devices import backend
from archsearch.latency.base import Backend, DeviceLostError, MeasurementError
from archsearch.studies.remote.queue import ClaimedMeasurement, MeasurementQueue, MeasurementSpec, orders
from archsearch.studies.signals import terminable
from archsearch.studies.storage.database import open_storage, storage_errors
from archsearch.studies.storage.leases import heartbeat
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

POLL_SECONDS = 1.0

Make = Callable[[str, Mapping[str, Any]], Backend]


def serve(
    url: str,
    device: str,
    options: Mapping[str, Any],
    *,
    tell: Callable[[str], None],
    idle_seconds: float | None = None,
    make: Make = lambda device, options: backend(device, **options),
) -> int:
    """Measure whatever searches ask of a device, until interrupted or idle for so long.

    Several processes may serve one storage. One that dies gives its measurement back: at once to others of its machine,
    to the rest when its heartbeat has stopped.

    Args:
        options: of this device's own, such as a signing team; they come on top of those that a search asks for.
        tell: takes a line for the user.
        make: the backend of a device and its options.

    Returns:
        The number of measurements made.

    Raises:
        InputError: if the storage or the device can not be used, or the device was lost.
        KeyboardInterrupt: once the measurement under way has been given back.
    """
    with storage_errors(url), terminable():
        storage = open_storage(url)
        server = _Server(storage, device, options, tell, make)
        server.backend(
            MeasurementSpec(device, 1, 1, {})
        )  # a device that can not be used is told before anything waits for it
        tell(f"serving {device} for {url.rpartition('@')[2]}")
        idle_since = time.monotonic()
        while idle_seconds is None or time.monotonic() - idle_since < idle_seconds:
            if server.serve_one():
                idle_since = time.monotonic()
            else:
                time.sleep(POLL_SECONDS)
        return server.made


class _Server:
    def __init__(
        self, storage: RDBStorage, device: str, options: Mapping[str, Any], tell: Callable[[str], None], make: Make
    ) -> None:
        self._storage, self._device, self._options = storage, device, dict(options)
        self._tell, self._make = tell, make
        self._backends: dict[str, Backend] = {}
        self.made = 0

    def backend(self, order: MeasurementSpec) -> Backend:
        if order.name not in self._backends:
            self._backends[order.name] = self._make(self._device, {**order.options, **self._options})
        return self._backends[order.name]

    def serve_one(self) -> bool:
        """Make one measurement; False if nothing waits."""
        for order in orders(self._storage, self._device):
            queue = MeasurementQueue(self._storage, order)
            for number in queue.bury():
                self._tell(f"measurement {number}: its device died; it waits again")
            if claimed := queue.claim():
                self._measure(queue, order, claimed)
                return True
        return False

    def _measure(self, queue: MeasurementQueue, order: MeasurementSpec, claimed: ClaimedMeasurement) -> None:
        name = f"measurement {claimed.number} ({claimed.architecture.id})"
        try:
            with heartbeat(self._storage, claimed.trial_id):
                record = self.backend(order).measure(claimed.architecture, order.latent_size, order.context_tokens)
        except DeviceLostError as error:
            queue.give_back(claimed)
            raise InputError(self._device, f"{error}; {name} waits again", error.remedy) from None
        except (MeasurementError, InputError) as error:
            queue.refuse(claimed, str(error))
            self._tell(f"{name}: {error}")
        except BaseException:
            queue.give_back(claimed)
            raise
        else:
            kept = queue.tell(claimed, record)
            self.made += kept
            ms = f"{record.median_ms:.4g} ms"
            self._tell(f"{name}: {ms}" + ("" if kept else ", dropped: another device has it now"))
