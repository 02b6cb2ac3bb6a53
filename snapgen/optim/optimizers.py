"""The optimizers of a net: AdamW for all parameters, or Muon for inner matrices and AdamW for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snapgen.optim.muon import Muon

FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which torch has a fused AdamW."""
MAX_ADAMW_SIDE = 16
"""Matrices with a side up to this use AdamW even with Muon: first and last convolutions, depthwise kernels."""


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW without its checks of every parameter, which take a small net longer than the update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        groups = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
        if not self.defaults["fused"] or not all(self.state[param] for params in groups for param in params):
            super().step()  # the first step, which also makes the state
            return
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group, params in zip(self.param_groups, groups, strict=True):
            states = [self.state[param] for param in params]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of gradients on one device, without the time that it takes to group them."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


class OptimizerGroup:
    """The optimizers of one net, which are stepped together.

    Weight decay applies to tensors of two or more dimensions, not to biases, norms and scales.
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
        muon = [p for p in self._params if kind == "muon" and _is_inner_matrix(p)]
        muon_ids = {id(p) for p in muon}
        adamw = [p for p in self._params if id(p) not in muon_ids]
        groups = [
            {"params": [p for p in adamw if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in adamw if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            AdamW(
                [group for group in groups if group["params"]],
                lr=learning_rate,
                betas=(0.9, beta2),
                fused=self._params[0].device.type in FUSED_DEVICES,
            )
        ]
        if muon:
            self._optimizers.append(Muon(muon, lr=learning_rate, weight_decay=weight_decay))

    def step(self, lr_scale: float, *, skip_nonfinite: bool = False) -> Tensor:
        """Step along the clipped gradients at ``lr_scale`` times the peak learning rate, and reset the gradients.

        Args:
            lr_scale: learning rate relative to its peak.
            skip_nonfinite: change nothing if the gradient is not finite. This waits for the device on MPS only.

        Returns:
            Norm of the gradient before clipping, 0-dim, on the device.
        """
        norm = clip_gradients([p.grad for p in self._params if p.grad is not None], self._clip)
        fused = norm.device.type in FUSED_DEVICES
        for optimizer in self._optimizers if fused or not skip_nonfinite or norm.isfinite() else ():
            if skip_nonfinite and fused:
                # The attribute that torch's gradient scaler sets on fused optimizers; our Muon reads it, too.
                optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["lr"] = self._peak * lr_scale
            optimizer.step()
        for param in self._params:
            param.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """State on which the next step depends in addition to weights and configuration, by name."""
        return {
            f"{number}.{key}": tensor
            for number, optimizer in enumerate(self._optimizers)
            for key, tensor in state_of(optimizer).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state`."""
        for number, optimizer in enumerate(self._optimizers):
            prefix = f"{number}."
            load_state(optimizer, {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors keyed by parameter index and name, without its hyperparameters."""
    return {
        f"{param}.{name}": tensor
        for param, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load the result of `state_of` into an optimizer with the same parameters and hyperparameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    by_param: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        index, name = key.split(".", 1)
        param = params[int(index)]
        # Fused optimizers require the parameter's memory format, which files do not keep.
        copied = torch.empty_like(param) if tensor.shape == param.shape else torch.empty_like(tensor)
        by_param.setdefault(int(index), {})[name] = copied.copy_(tensor)
    optimizer.load_state_dict({"state": by_param, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_inner_matrix(param: Tensor) -> bool:
    return param.ndim >= 2 and min(param.shape[0], param[0].numel()) > MAX_ADAMW_SIDE
