"""Where tensors live: CUDA, then MPS, then CPU, chosen once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def choose() -> torch.device:
    """The best device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
