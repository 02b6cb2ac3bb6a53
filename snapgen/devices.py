"""Choice of the torch device: CUDA, then MPS, then CPU; the memory that is free, and the number of CPU threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from snapgen.errors import InputError

_GROUP = Path("/sys/fs/cgroup")


def fits_on_device(size: int, device: torch.device) -> bool:
    """Whether a data set of ``size`` bytes may be kept on the device.

    On CUDA it may take up to a quarter of the free memory. Data always fit on the CPU, where they already are, and are
    never moved to other devices.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return size * 4 < free_bytes


@functools.cache
def default_device() -> torch.device:
    """The best torch device of this machine; looked up once per process."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def free_memory() -> int:
    """Bytes of memory that are free on this machine, or in the container that this process is in."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # another system, or no limit ("max")
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)))


def check_memory(size: int, source: str | Path) -> None:
    """Check, before anything is allocated, that ``size`` bytes are free.

    Raises:
        InputError: if not.
    """
    free = free_memory()
    if size > free:
        problem = f"needs {size / 1e9:,.1f} GB of memory or more, and {free / 1e9:,.1f} GB are free"
        raise InputError(source, problem, "name a smaller one, or use a machine with more")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads inside the block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
