"""Rectified flow: noising, training loss and sampling.

x_t = (1 − t)·x₀ + t·ε with t from 0 (data) to 1 (noise); velocity v = ε − x₀ (SnapGen, section 4). Latents are assumed
to have zero mean and unit standard deviation.
"""

from __future__ import annotations

import itertools
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


def losses(
    net: Denoiser,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor | None,
    *,
    prediction_type: FlowPredictionType = "velocity",
) -> Tensor:
    """Loss of each image: squared error of the velocity, mean over its elements, (B,) float32."""
    velocity = predict_velocity(net, interpolate(data, noise, t), t, context, prediction_type)
    return mse_per_image(velocity, noise - data)  # ‖v_θ(x_t, t, c) − (ε − x₀)‖²


def mse_per_image(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over each image's elements: (B, C, H, W), (B, C, H, W) → (B,) float32."""
    return (prediction - target).float().square().flatten(1).mean(1)


def per_image_noise(indices: Sequence[int], shape: Sequence[int], *, seed: int, name: str = "noise") -> Tensor:
    """Standard normal noise that depends on the index of each image, not on the batch: (len(indices), *shape)."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise, indices, strict=True):
        torch.randn(row.shape, generator=torch.Generator().manual_seed(derive_seed(seed, name, index)), out=row)
    return noise


def validation_times(pairs: int, *, seed: int, shift: float = 1) -> Tensor:
    """Timesteps of the fixed validation pairs: one from each of ``pairs`` strata of the training distribution.

    Strata are quantiles of the (shifted) logit-normal distribution. They are assigned to the pairs by a fixed random
    permutation, so that t does not depend on the order of the images.

    Returns:
        (pairs,) float32.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation t"))
    return shift_timesteps(logit_normal(stratified(pairs, generator)), shift)


@torch.no_grad()
def validation_losses(
    net: Denoiser,
    data: Tensor,
    context: Tensor | None,
    *,
    seed: int,
    prediction_type: FlowPredictionType = "velocity",
    shift: float = 1,
    batch: int = 128,
) -> Tensor:
    """Loss of each image at its fixed timestep and noise; their mean is the validation loss.

    Args:
        net: the net, on the device of the data.
        data: images or latents (N, C, H, W).
        context: their contexts (N, tokens, dim), or None.
        seed: determines timesteps and noise, independently of the batch size.
        prediction_type: meaning of the net's output.
        shift: shift of the timesteps towards noise.
        batch: images per forward pass.

    Returns:
        (N,) float64 on the CPU.
    """

    def loss(data: Tensor, noise: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return losses(net, data, noise, t, context, prediction_type=prediction_type)

    times = validation_times(len(data), seed=seed, shift=shift)
    return losses_over_pairs(loss, data, context, times, seed=seed, batch=batch)


def losses_over_pairs(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    data: Tensor,
    context: Tensor | None,
    times: Tensor,
    *,
    seed: int,
    batch: int = 128,
) -> Tensor:
    """Evaluate a loss on all validation pairs, each with noise that depends on its index only.

    Args:
        loss: function of (data, noise, t, context) that returns (B,).
        data: (N, C, H, W).
        context: (N, tokens, dim), or None.
        times: timestep of each pair (N,).
        seed: determines the noise.
        batch: pairs per call of ``loss``.

    Returns:
        (N,) float64 on the CPU.
    """
    times, batches = times.to(data.device), []
    for start in range(0, len(data), batch):
        rows = slice(start, min(start + batch, len(data)))
        noise = per_image_noise(range(rows.start, rows.stop), data.shape[1:], seed=seed, name="validation noise")
        batch_context = None if context is None else context[rows]
        batches.append(loss(data[rows], noise.to(data.device), times[rows], batch_context))
    return torch.cat(batches).double().cpu()


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    context: Tensor | None,
    *,
    steps: int,
    guidance: float = 1,
    prediction_type: FlowPredictionType = "velocity",
    shift: float = 1,
) -> Tensor:
    """Sample with Euler's method and classifier-free guidance: noise (B, C, H, W) → data (B, C, H, W).

    Before the shift the timesteps are evenly spaced. Each step calls `guided_velocity` once.
    """
    times = shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise
    for t_now, t_next in itertools.pairwise(times):  # x ← x + (t' − t)·v
        t = torch.full((len(x),), t_now, device=x.device, dtype=x.dtype)
        x = x + (t_next - t_now) * guided_velocity(net, x, t, context, guidance, prediction_type)
    return x


def guided_velocity(
    net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, guidance: float, prediction_type: FlowPredictionType
) -> Tensor:
    """Velocity with classifier-free guidance: v_∅ + guidance·(v_c − v_∅), where ∅ is a context of zeros.

    A guidance of 1 takes one evaluation, any other a batch of twice the size. Without a context guidance has no effect.
    """
    if guidance == 1 or context is None:
        return predict_velocity(net, x, t, context, prediction_type)
    contexts = torch.cat([context, torch.zeros_like(context)])  # (B, N, dim) → (2·B, N, dim)
    velocity = predict_velocity(net, torch.cat([x, x]), torch.cat([t, t]), contexts, prediction_type)
    cond, uncond = velocity.chunk(2)
    return torch.lerp(uncond, cond, guidance)  # v_∅ + w·(v_c − v_∅)


def zero_velocity_loss(data: Tensor) -> float:
    """Loss of a net whose velocity is zero, E‖ε − x₀‖² per element: the loss of an untrained net."""
    return 1 + float(data.double().square().mean())


def _broadcast(t: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1) with as many axes as ``x``."""
    return t.view(-1, *[1] * (x.ndim - 1))
