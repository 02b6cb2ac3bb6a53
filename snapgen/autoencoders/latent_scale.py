"""Scale of the latents of diffusers' AutoencoderKL, by which its encoder's output is normalized for a diffusion net."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from snapgen.errors import InputError


class LatentScale(NamedTuple):
    """The mean that is subtracted from latents, and the factor by which they are multiplied then, by channel."""

    mean: Tensor
    """(C, 1, 1) float64."""
    factor: Tensor
    """(C, 1, 1) float64."""

    def normalize(self, raw: Tensor) -> Tensor:
        """The encoder's output (B, C, h, w) as latents of about unit scale."""
        mean, factor = (part.float().to(raw.device) for part in self)
        return ((raw.float() - mean) * factor).to(raw.dtype)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the decoder takes them."""
        mean, factor = (part.float().to(latents.device) for part in self)
        return (latents.float() / factor + mean).to(latents.dtype)


def latent_scale(vae: AutoencoderKL, source: str | Path = "autoencoder") -> LatentScale:
    """The scale that an autoencoder's configuration gives, as diffusers' pipelines apply it.

    Either ``shift_factor`` and ``scaling_factor`` (SD3), or ``latents_mean``, ``latents_std`` and ``scaling_factor``
    (some of SDXL's): z = (raw − mean) · scaling_factor / std.

    Args:
        vae: the autoencoder.
        source: its configuration's file, for error messages.

    Raises:
        InputError: if the fields contradict each other, or are not of numbers for each channel.
    """
    config, channels = vae.config, vae.config.latent_channels
    scale, shift = _numbers([config.scaling_factor], 1), _numbers([config.shift_factor or 0], 1)
    if not scale or not scale[0]:
        _reject(source, "scaling_factor", config.scaling_factor, "is not a number other than 0")
    if not shift:
        _reject(source, "shift_factor", config.shift_factor, "is not a number")
    mean, std = shift * channels, [1.0] * channels
    fields = {name: config.get(name) for name in ("latents_mean", "latents_std")}
    if any(value is not None for value in fields.values()):
        for name, value in fields.items():
            if len(_numbers(value, channels)) != channels or (name == "latents_std" and min(value) <= 0):
                _reject(source, name, value, f"does not give a number for each of {channels} channels")
        if config.shift_factor:
            _reject(source, "shift_factor", config.shift_factor, "contradicts latents_mean")
        mean, std = (_numbers(value, channels) for value in fields.values())
    numbers = torch.tensor([mean, std], dtype=torch.float64)[..., None, None]
    return LatentScale(numbers[0], scale[0] / numbers[1])


def _numbers(value: Any, count: int) -> list[float]:
    """A list of so many finite numbers; empty if the value is not one."""
    values = list(value) if isinstance(value, list | tuple) else []
    are_numbers = all(isinstance(each, int | float) and math.isfinite(each) for each in values)
    return [float(each) for each in values] if are_numbers and len(values) == count else []


def _reject(source: str | Path, field: str, value: object, problem: str) -> None:
    raise InputError(source, f"{problem} ({value!r:.60})", "restore it from its source", place=field)
