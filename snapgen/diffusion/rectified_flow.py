"""Rectified flow: the path from data to noise, its loss, and the way back.

x_t = (1 − t)·x₀ + t·ε with t from 0 (data) to 1 (noise); velocity v = ε − x₀ (SnapGen, section 4). Latents are taken to
have zero mean and unit standard deviation.
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
"""What the net's output stands for; see `predict_velocity`."""

FLOW_PREDICTION_TYPES: tuple[str, ...] = get_args(FlowPredictionType)

SMALLEST_T = 0.05
"""Below it x₀ is turned into a velocity as if t were this: the division by t would let one pair rule the batch."""


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t: (B, C, H, W), (B, C, H, W), (B,) → (B, C, H, W)."""
    return torch.lerp(data, noise, _over(t, data))


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Timesteps moved towards noise for higher resolutions: t' = s·t / (1 + (s − 1)·t) (SD3, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(quantile: Tensor, mean: float = 0, std: float = 1) -> Tensor:
    """Timesteps at quantiles of a logit-normal distribution."""
    return torch.sigmoid(mean + std * torch.special.ndtri(quantile))


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number from each of ``count`` equal strata of (0, 1), in random order: (count,) on the CPU.

    A batch of timesteps drawn so covers the range every time, which takes most of t's variance out of the gradient.
    """
    offset = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    return ((order + offset) / count).clamp(1e-6, 1 - 1e-6).float()


def predict_velocity(
    net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, prediction: FlowPredictionType
) -> Tensor:
    """The velocity that a net says.

    ``velocity``: its output. ``data``: its output is x₀, and v = (x_t − x₀) / t. ``preconditioned``: it sees σ·x_t and
    v = (2t − 1)·σ²·x_t + σ·output, σ = 1/√(t² + (1 − t)²), so that for unit Gaussian data the output's target has zero
    correlation with x_t and unit variance at every t (EDM, arXiv 2206.00364, section 5, carried over to flow).
    """
    if prediction == "velocity":
        return net(x, t, context)
    if prediction == "data":
        return (x - net(x, t, context)) / _over(t, x).clamp(min=SMALLEST_T)
    at = _over(t, x)
    scale = torch.rsqrt(at**2 + (1 - at) ** 2)
    return (2 * at - 1) * scale**2 * x + scale * net(x * scale, t, context)


def losses(
    net: Denoiser,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    context: Tensor | None,
    *,
    prediction: FlowPredictionType = "velocity",
) -> Tensor:
    """Squared error of the velocity, mean over each image's elements: (B,) float32."""
    velocity = predict_velocity(net, interpolate(data, noise, t), t, context, prediction)
    return mse_per_image(velocity, noise - data)


def mse_per_image(said: Tensor, wanted: Tensor) -> Tensor:
    """Squared difference, mean over each image's elements: (B, C, H, W), (B, C, H, W) → (B,) float32."""
    return (said - wanted).float().square().flatten(1).mean(1)


def per_image_noise(indices: Sequence[int], shape: Sequence[int], *, seed: int, name: str = "noise") -> Tensor:
    """Unit Gaussian noise that depends on each image's index alone, never on the batch: (len(indices), *shape)."""
    noise = torch.empty(len(indices), *shape)
    for row, index in zip(noise, indices, strict=True):
        torch.randn(row.shape, generator=torch.Generator().manual_seed(derive_seed(seed, name, index)), out=row)
    return noise


def validation_times(pairs: int, *, seed: int, shift: float = 1) -> Tensor:
    """The timesteps of the fixed validation pairs: one from each of ``pairs`` strata of the training distribution.

    Strata are quantiles of the (shifted) logit-normal; which pair gets which is a fixed permutation, so that t says
    nothing of the image. (pairs,) float32.
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
    prediction: FlowPredictionType = "velocity",
    shift: float = 1,
    batch: int = 128,
) -> Tensor:
    """The loss of each of a fixed set of (t, noise) pairs, one an image: (N,) float64 on the CPU.

    Equal for equal ``seed`` whatever the batch; the validation loss is its mean. ``data`` (N, C, H, W) and ``context``
    (N, tokens, width) hold the pairs' images in order, on the net's device.
    """

    def loss(data: Tensor, noise: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return losses(net, data, noise, t, context, prediction=prediction)

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
    """Losses of (data, noise, t, context), (B,) each, over pairs with noise of their own: (N,) float64 on the CPU."""
    times, found = times.to(data.device), []
    for start in range(0, len(data), batch):
        rows = slice(start, min(start + batch, len(data)))
        noise = per_image_noise(range(rows.start, rows.stop), data.shape[1:], seed=seed, name="validation noise")
        some = None if context is None else context[rows]
        found.append(loss(data[rows], noise.to(data.device), times[rows], some))
    return torch.cat(found).double().cpu()


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    context: Tensor | None,
    *,
    steps: int,
    guidance: float = 1,
    prediction: FlowPredictionType = "velocity",
    shift: float = 1,
) -> Tensor:
    """Euler's method from noise to data, with classifier-free guidance: (B, C, H, W) → (B, C, H, W).

    The steps are even in t before the shift; a step costs what `guided_velocity` does.
    """
    times = shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise
    for now, then in itertools.pairwise(times):
        t = torch.full((len(x),), now, device=x.device, dtype=x.dtype)
        x = x + (then - now) * guided_velocity(net, x, t, context, guidance, prediction)
    return x


def guided_velocity(
    net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, guidance: float, prediction: FlowPredictionType
) -> Tensor:
    """v_∅ + guidance·(v_c − v_∅), ∅ being a context of zeros; guidance 1 costs one evaluation, others a double batch.

    Without a context the guidance decides nothing.
    """
    if guidance == 1 or context is None:
        return predict_velocity(net, x, t, context, prediction)
    both = torch.cat([context, torch.zeros_like(context)])
    velocity = predict_velocity(net, torch.cat([x, x]), torch.cat([t, t]), both, prediction)
    conditional, unconditional = velocity.chunk(2)
    return torch.lerp(unconditional, conditional, guidance)


def zero_velocity_loss(data: Tensor) -> float:
    """What a net that says v = 0 would get, E‖ε − x₀‖²: where every loss starts from."""
    return 1 + float(data.double().square().mean())


def _over(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))
