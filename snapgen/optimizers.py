"""From gradients to steps: AdamW for everything, or Muon for the matrices inside the net and AdamW for the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from snapgen.muon import Muon

SMALLEST_SIDE = 16
"""A narrower matrix (the latent's side of the first and last convolutions, depthwise kernels) is AdamW's."""


class Optimizers:
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
                fused=self._params[0].device.type in ("cpu", "cuda"),
            )
        ]
        if inner:
            self._all.append(Muon(inner, lr=learning_rate, weight_decay=weight_decay))

    def step(self, rate: float) -> None:
        """One step at ``rate`` times the peak learning rate, along the clipped gradients, which are then dropped."""
        torch.nn.utils.clip_grad_norm_(self._params, self._clip)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = self._peak * rate
            optimizer.step()
        for param in self._params:
            param.grad = None


def _is_inner_matrix(param: Tensor) -> bool:
    return param.ndim >= 2 and min(param.shape[0], param[0].numel()) > SMALLEST_SIDE
