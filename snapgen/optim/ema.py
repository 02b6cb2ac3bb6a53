"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor, nn


class EMA:
    """Power-function exponential moving average, whose window grows with the run (EDM2, section 3.1).

    The decay of step n is (1 − 1/n)^(γ+1), with γ such that the average's width is ``sigma_rel`` times the number of
    steps so far. One setting therefore suits runs of any length, and the initial weights are forgotten.

    Args:
        module: its floating-point parameters and buffers are averaged.
        sigma_rel: relative width σ_rel; 0: no averaging, the average is the current weights.
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        self._module = module
        self._gamma = ema_gamma(sigma_rel) if sigma_rel else None
        self._weights = [t for t in _state(module).values() if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._weights] if sigma_rel else self._weights

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after ``step``, counted from 1, to the average."""
        if self._gamma is not None:
            decay = (1 - 1 / step) ** (self._gamma + 1)
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """A copy of the average, in the layout of the module's ``state_dict()``."""
        average = iter(self._average)
        return {
            name: (next(average) if tensor.is_floating_point() else tensor).detach().clone()
            for name, tensor in _state(self._module).items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state`, of a U-Net also under names of earlier versions."""
        state = dict(state)
        if isinstance(self._module, ModelMixin):
            self._module._fix_state_dict_keys_on_load(state)
        names = [name for name, tensor in _state(self._module).items() if tensor.is_floating_point()]
        for average, name in zip(self._average, names, strict=True):
            average.copy_(state[name])


def ema_gamma(sigma_rel: float) -> float:
    """EDM2's γ for a relative width σ_rel: the positive root of σ_rel²·(γ + 2)²·(γ + 3) = γ + 1 (its equation 125)."""
    # divided by σ_rel²: γ³ + 7γ² + (16 − σ_rel⁻²)·γ + (12 − σ_rel⁻²) = 0
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _state(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)
