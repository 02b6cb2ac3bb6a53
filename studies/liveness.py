"""Whether the process that works on a trial still lives: known at once on this machine, by heartbeats elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def me() -> dict[str, Any]:
    """This process, for a trial's `worker` attribute.

    A pid alone is used again by the system; with the time it started at it is unique on a host. Containers that share
    a host name do not share pids, so their process namespace is part of the host's name.
    """
    return {"host": _host(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")
    try:
        return f"{socket.gethostname()} {namespace.readlink()}"
    except OSError:
        return socket.gethostname()


def is_dead(worker: Mapping[str, Any]) -> bool:
    """Whether a worker is a process of this host that has ended. Of another host's nothing is known: False."""
    if worker.get("host") != _host():
        return False
    try:
        process = psutil.Process(int(worker["pid"]))
        # A killed child that its parent has not waited for yet is still in the table.
        zombie = bool(process.status() == psutil.STATUS_ZOMBIE)
        return zombie or abs(process.create_time() - float(worker["started"])) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
