"""Leases of trials: who works on one, and whether that process lives."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled

from archsearch.studies.storage.outages import patience
from archsearch.studies.storage.record import WorkerIdentity

BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
START_FIELD = 19
"""Place of a process's start in /proc/PID/stat, behind its name."""

JOIN_SECONDS = 5
"""Longest time that the end of a trial waits for a heartbeat that is on its way."""

WATCHED_INTERVALS = 1.5
"""Intervals between heartbeats for which a silent worker is watched, before it is taken for dead.

When a database is back that was away, all workers are silent, and the first one to read it must not believe that.
"""


class SilenceWatch:
    """Watches which trials of a study are silent: their workers have sent no heartbeat for the grace period."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._since: dict[int, float] = {}

    def silent(self) -> set[int]:
        """Ids of the trials that have been silent for as long as a living worker would not be."""
        storage = self._storage
        if not isinstance(storage, BaseHeartbeat) or (seconds := storage.get_heartbeat_interval()) is None:
            return set()
        now, grace = time.monotonic(), getattr(getattr(storage, "_backend", storage), "grace_period", math.inf)
        self._since = {i: self._since.get(i, now) for i in storage._get_stale_trial_ids(self._study_id)}
        watched = min(grace, WATCHED_INTERVALS * seconds)
        return {trial_id for trial_id, since in self._since.items() if now - since >= watched}


def send_heartbeat(storage: BaseStorage, trial_id: int) -> None:
    """Record one heartbeat, if the storage supports heartbeats."""
    if is_heartbeat_enabled(storage):
        assert isinstance(storage, BaseHeartbeat)
        storage.record_heartbeat(trial_id)


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Send heartbeats from a thread while the block runs.

    Optuna's own heartbeat thread is not used: an interrupt while it starts leaves it, and the process, running.
    """
    seconds = storage.get_heartbeat_interval() if isinstance(storage, BaseHeartbeat) else None
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(seconds):
            # A database that is away for a moment, or a full disk, is no reason to fall silent for good.
            with contextlib.suppress(Exception), patience(0):
                send_heartbeat(storage, trial_id)

    send_heartbeat(storage, trial_id)
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    try:
        thread.start()
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join(JOIN_SECONDS)


def worker_identity(pid: int | None = None) -> WorkerIdentity:
    """Identity of a process of this host, for the trials that it works on.

    Args:
        pid: the process; None: this one.
    """
    pid = os.getpid() if pid is None else pid
    return WorkerIdentity(host=_host(), pid=pid, started=_start(pid))


def _host() -> str:
    """Name of the host, of its boot, and of the namespace of its pids.

    Machines may share a name, and containers on one machine do not share their pids.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux
        parts += [BOOT_ID.read_text().strip(), str(PID_NAMESPACE.readlink())]
    return " ".join(parts)


def _start(pid: int) -> float:
    """Start of a process, by a clock that nobody sets: on Linux in ticks since the boot.

    Raises:
        psutil.NoSuchProcess: if there is no such process.
    """
    if not PID_NAMESPACE.is_symlink():
        return psutil.Process(pid).create_time()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return float(fields.rpartition(")")[2].split()[START_FIELD])


def is_dead(worker: WorkerIdentity) -> bool:
    """Whether a worker is a process of this host that has ended; always False for processes of other hosts."""
    if worker.host != _host():
        return False
    try:
        # The system reuses pids. A killed child stays in the process table until its parent waits for it.
        is_another = abs(_start(worker.pid) - worker.started) > 1
        return is_another or bool(psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, PermissionError):
        return False
