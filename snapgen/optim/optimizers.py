"""From gradients to steps: AdamW for everything, or Muon for the matrices inside the net and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from snapgen.optim.muon import Muon

FUSED = ("cpu", "cuda")
"""Devices on which torch's AdamW is one kernel."""
SMALLEST_SIDE = 16
"""A narrower matrix (the latent's side of the first and last convolutions, depthwise kernels) is AdamW's."""


class OptimizerGroup:
    """The optimizers of one net, stepped as one.

    Weight decay holds for tensors of two and more dimensions: not for biases, norms and scales.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        kind: Literal["adamw", "muon"],
        learning_rate: float,
        beta2: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        self._params = [p for p in net.parameters() if p.requires_grad]
        self._clip = clip
        self._peak = learning_rate
        inner = [p for p in self._params if kind == "muon" and _is_inner_matrix(p)]
        taken = {id(p) for p in inner}
        rest = [p for p in self._params if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=learning_rate,
                betas=(0.9, beta2),
                fused=self._params[0].device.type in FUSED,
            )
        ]
        if inner:
            self._all.append(Muon(inner, lr=learning_rate, weight_decay=weight_decay))

    def step(self, rate: float, *, skip_bad: bool = False) -> Tensor:
        """One step at ``rate`` times the peak learning rate, along the clipped gradients, which are then dropped.

        Args:
            skip_bad: change nothing where the gradient is not finite. Only MPS is waited for.

        Returns:
            The gradient's norm before it was clipped, 0-dim, on the device.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._params, self._clip)
        fused = norm.device.type in FUSED
        for optimizer in self._all if fused or not skip_bad or norm.isfinite() else ():
            if skip_bad and fused:
                # What torch's own scaler of gradients tells a fused optimizer; Muon understands it, too.
                optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["lr"] = self._peak * rate
            optimizer.step()
        for param in self._params:
            param.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside weights and settings, by name."""
        return {
            f"{number}.{key}": tensor
            for number, optimizer in enumerate(self._all)
            for key, tensor in state_of(optimizer).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for number, optimizer in enumerate(self._all):
            mine = f"{number}."
            load_state(optimizer, {k.removeprefix(mine): t for k, t in state.items() if k.startswith(mine)})


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by parameter and name, without its settings."""
    return {
        f"{param}.{name}": tensor
        for param, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Let an optimizer with the same parameters and settings go on from what `state_of` gave."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        param, name = key.split(".", 1)
        like = params[int(param)]
        # Fused optimizers go through memory in the parameter's order, which files do not keep.
        same = torch.empty_like(like) if tensor.shape == like.shape else torch.empty_like(tensor)
        found.setdefault(int(param), {})[name] = same.copy_(tensor)
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_inner_matrix(param: Tensor) -> bool:
    return param.ndim >= 2 and min(param.shape[0], param[0].numel()) > SMALLEST_SIDE
