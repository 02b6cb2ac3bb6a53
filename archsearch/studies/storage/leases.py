"""Leases of trials: who works on one, whether that process lives, and how a trial ends."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def end_trial(
    storage: BaseStorage,
    trial_id: int,
    state: Literal["COMPLETE", "FAIL"],
    values: Sequence[float] | None = None,
    /,
    **attrs: Any,
) -> bool:
    """Set user attributes of a trial and end it.

    Returns:
        False if the trial had ended already; then nothing changes.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        for key, value in attrs.items():
            storage.set_trial_user_attr(trial_id, key, value)
        storage.set_trial_state_values(trial_id, TrialState[state], values)
    except UpdateFinishedTrialError:
        return False
    return True


def send_heartbeat(storage: BaseStorage, trial_id: int) -> None:
    """Record one heartbeat, if the storage supports heartbeats."""
    from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled

    if is_heartbeat_enabled(storage):
        assert isinstance(storage, BaseHeartbeat)
        storage.record_heartbeat(trial_id)


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Send heartbeats from a thread while the block runs.

    Optuna's own heartbeat thread is not used: an interrupt while it starts leaves it, and the process, running.
    """
    from optuna.storages._heartbeat import BaseHeartbeat

    seconds = storage.get_heartbeat_interval() if isinstance(storage, BaseHeartbeat) else None
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(seconds):
            send_heartbeat(storage, trial_id)

    send_heartbeat(storage, trial_id)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    try:
        thread.start()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def worker_identity() -> dict[str, Any]:
    """Identity of this process, for a trial's ``worker`` attribute.

    The system reuses pids; pid and start time together are unique on a host. Containers that share a host name do not
    share pids, so the process namespace is part of the host's name.
    """
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")
    try:
        return f"{socket.gethostname()} {namespace.readlink()}"
    except OSError:
        return socket.gethostname()


def is_dead(worker: Mapping[str, Any]) -> bool:
    """Whether a worker is a process of this host that has ended; always False for processes of other hosts."""
    if worker.get("host") != _host():
        return False
    try:
        process = psutil.Process(int(worker["pid"]))
        # A killed child stays in the process table until its parent waits for it.
        zombie = bool(process.status() == psutil.STATUS_ZOMBIE)
        return zombie or abs(process.create_time() - float(worker["started"])) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
