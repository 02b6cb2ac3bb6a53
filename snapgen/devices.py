"""Where tensors live: CUDA, then MPS, then CPU, chosen once."""

from __future__ import annotations

import functools

import torch


def fits_on_device(size: int, device: torch.device) -> bool:
    """Whether so many bytes may live on the device: a quarter of its free memory, or any size where they lie now."""
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return size * 4 < free


@functools.cache
def default_device() -> torch.device:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
