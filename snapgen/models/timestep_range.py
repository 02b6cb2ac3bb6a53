"""Range of the timesteps that a U-Net takes: diffusers' count from 0 to 1000, and would give noise in silence."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1.5 / 1000
"""Distance by which a timestep may leave [0, 1]: Stable Diffusion's schedule has its data at −1 / 1000."""
_TAKES = "takes timesteps from 0 (data) to 1 (noise): divide diffusers' by the scheduler's num_train_timesteps"


def check_timestep(timestep: Tensor | float) -> None:
    """Raise if a timestep is out of range.

    Batches of them are not read, for which a GPU would be waited for: there a failed assertion ends the process's work
    on the GPU. In a graph that is traced or compiled, nothing is checked.

    Raises:
        ValueError: if it is.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined, no-untyped-call]
        return
    if not isinstance(timestep, Tensor) or (not timestep.ndim and not timestep.is_meta):
        value = float(timestep)
        if not -TOLERANCE <= value <= 1 + TOLERANCE:
            raise ValueError(f"the timestep is {value:g}; the net {_TAKES}")
    elif timestep.device.type in ("cpu", "cuda"):
        in_range = ((timestep >= -TOLERANCE) & (timestep <= 1 + TOLERANCE)).all()
        try:
            torch._assert_async(in_range, f"a timestep is out of range; the net {_TAKES}")
        except RuntimeError as error:
            raise ValueError(str(error)) from None
