"""Heartbeats of a trial that is worked on, so that processes of other machines know that its worker lives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def beat(storage: BaseStorage, trial_id: int) -> None:
    """One heartbeat, where the storage keeps them."""
    from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled

    if is_heartbeat_enabled(storage):
        assert isinstance(storage, BaseHeartbeat)
        storage.record_heartbeat(trial_id)


@contextlib.contextmanager
def beating(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Heartbeats for as long as the block runs.

    Optuna's own thread is left running, and the process with it, by an interrupt that comes while it starts.
    """
    from optuna.storages._heartbeat import BaseHeartbeat

    seconds = storage.get_heartbeat_interval() if isinstance(storage, BaseHeartbeat) else None
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(seconds):
            beat(storage, trial_id)

    beat(storage, trial_id)
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    try:
        thread.start()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
