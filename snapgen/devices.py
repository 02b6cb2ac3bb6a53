"""Choice of the torch device: CUDA, then MPS, then CPU; and the number of CPU threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads inside the block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
