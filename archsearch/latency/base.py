"""The interface of a latency backend, and the errors that it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from archsearch.machine_faults import machine_fault
from archsearch.score import LatencyRecord
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError


class MeasurementError(RuntimeError):
    """Raised if a candidate cannot be measured on a device; a study records the failure and continues."""


class DeviceLostError(RuntimeError):
    """Raised if the device is disconnected. The candidate is not at fault and may be measured later or elsewhere."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


class Backend(Protocol):
    """Interface of a backend that measures the latency of architectures on one device."""

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """Measure the latency of one forward pass at batch size 1.

        Args:
            arch: the architecture, with random weights.
            latent_size: height and width of the latent.
            context_tokens: length of the context.

        Raises:
            InputError: if the architecture does not support a latent of that size.
            MeasurementError: if the net cannot be built, loaded or run on the device, or not before the timeout.
            DeviceLostError: if the device is disconnected.
        """
        ...


@contextmanager
def measurement_errors(arch: Architecture, device: str) -> Iterator[None]:
    """Turn errors into MeasurementError, but for InputError, DeviceLostError and the machine's faults.

    The errors of ONNX Runtime and of Apple's packages share no class but Exception.
    """
    try:
        yield
    except (InputError, DeviceLostError):
        raise
    except Exception as error:
        if (fault := machine_fault(error)) is not None:
            raise fault from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MeasurementError(f"{arch.id} could not be measured on {device}: {reason}") from error


def sample_inputs(arch: Architecture, latent_size: int, context_tokens: int) -> dict[str, Tensor]:
    """Float32 inputs of a forward pass at batch size 1: noise, timestep 0.5 and a random context."""
    noise = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(1, arch.latent_channels, latent_size, latent_size, generator=noise),
        "timestep": torch.full((1,), 0.5),
        "context": torch.randn(1, context_tokens, arch.context_dim, generator=noise),
    }
