"""The variance-preserving process that Stable Diffusion 1.5 was trained on: noise, predictions, and DDIM's way back.

z_t = α_t·x + σ_t·ε with α² + σ² = 1 and SD-1.5's schedule of the αs; v = α·ε − σ·x (arXiv 2202.00512, section 4;
SnapFusion, arXiv 2306.00980, section 4). SD's timesteps are the integers 0 to 999; here they are t = i / 1000, so that
our nets' features of 1000·t are those of its net. α and σ are taken by index: t is rounded to the nearest i, and
nothing lies between two of them. One index more, −1, is the data themselves: α = 1, σ = 0.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal, get_args

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from snapgen.diffusion.rectified_flow import Denoiser

DiffusionPredictionType = Literal["v", "noise"]
"""What the net's output stands for: v, or ε as SD-1.5's own net has it."""

DIFFUSION_PREDICTION_TYPES: tuple[str, ...] = get_args(DiffusionPredictionType)

TIMESTEPS = 1000
DATA = -1 / TIMESTEPS
"""The timestep of the data, where sampling ends."""
SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""Of Stable Diffusion 1.5, as diffusers' schedulers take it."""


def alpha_sigma(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """α_t and σ_t, (B,) → (B, 1, 1, 1) each, float32, to be multiplied with ``like`` (B, C, H, W)."""
    place = (t.float() * TIMESTEPS).round().long() + 1
    alpha, sigma = _schedule(like.device)[:, place].view(2, -1, *[1] * (like.ndim - 1))
    return alpha, sigma


def add_noise(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t: (B, C, H, W), (B, C, H, W), (B,) → (B, C, H, W)."""
    alpha, sigma = alpha_sigma(t, data)
    return alpha * data + sigma * noise


def target(data: Tensor, noise: Tensor, t: Tensor, prediction: DiffusionPredictionType) -> Tensor:
    """What the net is to say at z_t: v = α·ε − σ·x, or ε; shapes as `add_noise`."""
    if prediction == "noise":
        return noise
    alpha, sigma = alpha_sigma(t, data)
    return alpha * noise - sigma * data


def predict_x0(said: Tensor, z: Tensor, t: Tensor, prediction: DiffusionPredictionType) -> Tensor:
    """x̂ of what a net says at z_t: α·z − σ·v̂, or (z − σ·ε̂) / α; float32, shapes as `add_noise`."""
    alpha, sigma = alpha_sigma(t, z)
    return (z - sigma * said.float()) / alpha if prediction == "noise" else alpha * z - sigma * said.float()


def ddim_step(z: Tensor, clean: Tensor, t: Tensor, then: Tensor) -> Tensor:
    """DDIM's deterministic step from t to a lower timestep: z' = α'·x̂ + σ'·ε̂, ε̂ = (z − α·x̂) / σ (arXiv 2010.02502)."""
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(t, z), alpha_sigma(then, z)
    return next_alpha * clean + next_sigma / sigma * (z - alpha * clean)


def ddim_timesteps(steps: int) -> Tensor:
    """The timesteps of so many steps, from noise to `DATA`: (steps + 1,) float32, highest first.

    Evenly spaced, rounded to SD's integers, and ending in the data: diffusers' spacing ``trailing``. Every second one
    of 2·N steps is one of N, which two-to-one distillation needs.
    """
    places = TIMESTEPS - torch.arange(steps + 1, dtype=torch.float64) * (TIMESTEPS / steps)
    return ((places.round() - 1) / TIMESTEPS).float()


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    context: Tensor | None,
    *,
    steps: int,
    guidance: float = 1,
    prediction: DiffusionPredictionType = "v",
) -> Tensor:
    """DDIM from noise to data, with classifier-free guidance: (B, C, H, W) → (B, C, H, W)."""
    z = noise
    for now, then in itertools.pairwise(ddim_timesteps(steps).to(noise.device)):
        t = now.expand(len(z))
        said = apply_cfg(net, z, t, context, guidance)
        z = ddim_step(z, predict_x0(said, z, t, prediction), t, then.expand(len(z))).to(noise.dtype)
    return z


def apply_cfg(net: Denoiser, z: Tensor, t: Tensor, context: Tensor | None, guidance: float) -> Tensor:
    """What the net says with guidance: ṽ = w·v(z, c) − (w − 1)·v(z, ∅) (SnapFusion, section 4); the same holds for ε.

    Guidance 1 costs one evaluation, others a double batch. Without a context the guidance decides nothing.
    """
    if guidance == 1 or context is None:
        return net(z, t, context)
    told, untold = cond_and_uncond(net, z, t, context)
    return torch.lerp(untold, told, guidance)


def cond_and_uncond(net: Denoiser, z: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """What the net says with the context and with zeros in its place, which are ∅: one double batch."""
    said = net(torch.cat([z, z]), torch.cat([t, t]), torch.cat([context, torch.zeros_like(context)]))
    told, untold = said.chunk(2)
    return told, untold


def scheduler(prediction: DiffusionPredictionType) -> DPMSolverMultistepScheduler:
    """Diffusers' scheduler that takes the steps of `sample`.

    A DPM-Solver of first order is DDIM. Diffusers' own ``DDIMScheduler`` always goes ⌊1000 / steps⌋ timesteps further,
    and so misses the next of its timesteps where ``steps`` does not divide 1000, as 16 and 32 do not.
    """
    return DPMSolverMultistepScheduler(
        **SCHEDULE,
        solver_order=1,
        prediction_type="epsilon" if prediction == "noise" else "v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


@functools.cache
def _schedule(device: torch.device) -> Tensor:
    """α and σ by index from −1 on: (2, 1001) float32."""
    kept = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    kept = torch.cat([torch.ones(1, dtype=torch.float64), kept])
    return torch.stack([kept.sqrt(), (1 - kept).sqrt()]).float().to(device)
