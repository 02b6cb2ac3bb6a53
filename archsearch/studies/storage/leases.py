"""Leases of trials: who works on one, and whether that process lives."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from archsearch.studies.storage.record import WorkerIdentity

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


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


def worker_identity() -> WorkerIdentity:
    """Identity of this process, for the trials that it works on.

    The system reuses pids; pid and start time together are unique on a host. Containers that share a host name do not
    share pids, so the process namespace is part of the host's name.
    """
    return WorkerIdentity(host=_host(), pid=os.getpid(), started=psutil.Process().create_time())


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")
    try:
        return f"{socket.gethostname()} {namespace.readlink()}"
    except OSError:
        return socket.gethostname()


def is_dead(worker: WorkerIdentity) -> bool:
    """Whether a worker is a process of this host that has ended; always False for processes of other hosts."""
    if worker.host != _host():
        return False
    try:
        process = psutil.Process(worker.pid)
        # A killed child stays in the process table until its parent waits for it.
        zombie = bool(process.status() == psutil.STATUS_ZOMBIE)
        return zombie or abs(process.create_time() - worker.started) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
