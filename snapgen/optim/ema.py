"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


class EMA:
    """The weights' exponential average, whose window grows with the run (EDM2, section 3.1).

    At step n the decay is (1 − 1/n)^(γ+1), γ such that the average's width is ``width`` times the run so far: the same
    setting suits a run of any length, and the first weights are forgotten.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        self._module = module
        self._exponent = ema_gamma(width) if width else None
        self._live = [t for t in _state(module).values() if t.is_floating_point()]
        self._kept = [t.detach().clone() for t in self._live] if width else self._live

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (from 1)."""
        if self._exponent is not None:
            decay = (1 - 1 / step) ** (self._exponent + 1)
            torch._foreach_lerp_(self._kept, self._live, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The average, in the layout of the module's ``state_dict()``; a copy."""
        kept = iter(self._kept)
        return {
            name: (next(kept) if tensor.is_floating_point() else tensor).detach().clone()
            for name, tensor in _state(self._module).items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        names = [name for name, tensor in _state(self._module).items() if tensor.is_floating_point()]
        for kept, name in zip(self._kept, names, strict=True):
            kept.copy_(state[name])


def ema_gamma(width: float) -> float:
    """EDM2's γ for a relative width σ_rel: the positive root of σ_rel²·(γ + 2)²·(γ + 3) = γ + 1 (its equation 125)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _state(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)
