"""The interface of a latency backend, and the errors that it raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from archsearch.score import LatencyRecord
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from torch import Tensor


class MeasurementError(RuntimeError):
    """A candidate could not be timed, for a reason of its own or the device's; a study records it and goes on."""


class DeviceLostError(RuntimeError):
    """The device itself is gone, which says nothing of the candidate: another one, or this one later, may time it."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


class Backend(Protocol):
    """Times architectures on one device."""

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """The latency of one forward pass at batch 1, on a square latent of that size and that many context tokens.

        Raises:
            InputError: if the architecture does not take a latent of that size.
            LatencyFailure: if it cannot be built, loaded or run there, or not in time.
            DeviceLost: if the device went away.
        """
        ...


def sample_inputs(arch: Architecture, latent_size: int, context_tokens: int) -> dict[str, Tensor]:
    """What a net takes in a forward pass at batch 1, float32: noise, the middle timestep, a random context."""
    import torch

    noise = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, arch.latent_channels, latent_size, latent_size, generator=noise),
        "timestep": torch.full((1,), 0.5),
        "context": torch.randn(1, context_tokens, arch.context_width, generator=noise),
    }
