"""Rectified flow: noising, timesteps and prediction types; `snapgen.diffusion.process` trains and samples with it.

x_t = (1 − t)·x₀ + t·ε with t from 0 (data) to 1 (noise); velocity v = ε − x₀ (SnapGen, section 4). Latents are assumed
to have zero mean and unit standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from snapgen.seeding import derive_seed

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(sample (B, C, H, W), timestep (B,), context (B, N, width) or None) → (B, C, H, W)."""

FlowPredictionType = Literal["velocity", "data", "preconditioned"]
"""Meaning of the net's output; see `predict_velocity`."""

FLOW_PREDICTION_TYPES: tuple[str, ...] = get_args(FlowPredictionType)

SMALLEST_T = 0.05
"""Lower bound of t in the division that turns x₀ into a velocity; without it one image could dominate the loss."""


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t: (B, C, H, W), (B, C, H, W), (B,) → (B, C, H, W)."""
    return torch.lerp(data, noise, _broadcast(t, data))  # (1 − t)·x₀ + t·ε


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Shift timesteps towards noise, as higher resolutions need: t' = s·t / (1 + (s − 1)·t) (SD3, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(quantile: Tensor, mean: float = 0, std: float = 1) -> Tensor:
    """Timesteps at the given quantiles of a logit-normal distribution (SD3, section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(quantile))


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number from each of ``count`` equal strata of (0, 1), in random order: (count,) on the CPU.

    Every batch then covers the whole range of timesteps, which removes most of the gradient's variance due to t.
    """
    offset = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    # Stratum i is (i / count, (i + 1) / count); the clamp keeps the quantiles away from 0 and 1, where logits diverge.
    return ((order + offset) / count).clamp(1e-6, 1 - 1e-6).float()


def predict_velocity(
    net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, prediction_type: FlowPredictionType
) -> Tensor:
    """Evaluate the net and convert its output to a velocity.

    - ``velocity``: the output is v.
    - ``data``: the output is x₀, and v = (x_t − x₀) / t.
    - ``preconditioned``: the net's input is σ·x_t and v = (2t − 1)·σ²·x_t + σ·output with σ = 1/√(t² + (1 − t)²). For
      unit Gaussian data the output's target is then uncorrelated with x_t and has unit variance at every t (EDM,
      arXiv 2206.00364, section 5, adapted to flow).

    Shapes: x (B, C, H, W), t (B,), context (B, N, dim) → (B, C, H, W).
    """
    if prediction_type == "velocity":
        return net(x, t, context)
    if prediction_type == "data":
        return (x - net(x, t, context)) / _broadcast(t, x).clamp(min=SMALLEST_T)  # (x_t − x₀) / t
    t_map = _broadcast(t, x)  # (B,) → (B, 1, 1, 1)
    sigma = torch.rsqrt(t_map**2 + (1 - t_map) ** 2)
    return (2 * t_map - 1) * sigma**2 * x + sigma * net(x * sigma, t, context)


def mse_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over each image's elements: (B, C, H, W), (B, C, H, W) → (B,) float32."""
    return (prediction - target).float().square().flatten(1).mean(1)


def per_image_noise(indices: Sequence[int], shape: Sequence[int], *, seed: int, name: str = "noise") -> Tensor:
    """Standard normal noise that depends on the index of each image, not on the batch: (len(indices), *shape)."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise, indices, strict=True):
        torch.randn(row.shape, generator=torch.Generator().manual_seed(derive_seed(seed, name, index)), out=row)
    return noise


def _broadcast(t: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1) with as many axes as ``x``."""
    return t.view(-1, *[1] * (x.ndim - 1))
