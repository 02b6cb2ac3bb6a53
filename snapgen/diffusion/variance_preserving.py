"""The variance-preserving diffusion process of Stable Diffusion 1.5: noising, prediction types and DDIM steps.

z_t = α_t·x + σ_t·ε with α² + σ² = 1 and SD-1.5's schedule of α; v = α·ε − σ·x (arXiv 2202.00512, section 4; SnapFusion,
arXiv 2306.00980, section 4). SD's timesteps are the integers 0 to 999; here they are t = i / 1000, so that our nets,
which embed 1000·t, see the same values as SD's net. α and σ are tabulated: t is rounded to the nearest i, without
interpolation. An additional index, −1, stands for the data: α = 1, σ = 0.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler

DiffusionPredictionType = Literal["v", "noise"]
"""Meaning of the net's output: v, or ε as for SD-1.5's own net."""

DIFFUSION_PREDICTION_TYPES: tuple[str, ...] = get_args(DiffusionPredictionType)

TIMESTEPS = 1000
DATA = -1 / TIMESTEPS
"""Timestep of the data, at which sampling ends."""
SCHEDULE = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""Noise schedule of Stable Diffusion 1.5, as arguments of diffusers' schedulers."""


def alpha_sigma(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Look up α_t and σ_t for timesteps (B,), shaped (B, 1, 1, 1) to broadcast with ``x`` (B, C, H, W); float32."""
    index = (t.float() * TIMESTEPS).round().long() + 1  # the table starts at timestep −1
    # (2, 1001) → (2, B) → two of (B, 1, 1, 1)
    alpha, sigma = _schedule(x.device)[:, index].view(2, -1, *[1] * (x.ndim - 1))
    return alpha, sigma


def add_noise(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = α·x + σ·ε: (B, C, H, W), (B, C, H, W), (B,) → (B, C, H, W)."""
    alpha, sigma = alpha_sigma(t, data)
    return alpha * data + sigma * noise


def target(data: Tensor, noise: Tensor, t: Tensor, prediction_type: DiffusionPredictionType) -> Tensor:
    """Training target at z_t: v = α·ε − σ·x, or ε; shapes as in `add_noise`."""
    if prediction_type == "noise":
        return noise
    alpha, sigma = alpha_sigma(t, data)
    return alpha * noise - sigma * data


def predict_x0(output: Tensor, z: Tensor, t: Tensor, prediction_type: DiffusionPredictionType) -> Tensor:
    """x̂ from a net's output at z_t: α·z − σ·v̂, or (z − σ·ε̂) / α; float32, shapes as in `add_noise`."""
    alpha, sigma = alpha_sigma(t, z)
    return (z - sigma * output.float()) / alpha if prediction_type == "noise" else alpha * z - sigma * output.float()


def ddim_step(z: Tensor, x0: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Deterministic DDIM step to a lower timestep: z' = α'·x̂ + σ'·ε̂ with ε̂ = (z − α·x̂) / σ (arXiv 2010.02502).

    Args:
        z: noisy latents (B, C, H, W) at timesteps ``t``.
        x0: predicted data x̂ (B, C, H, W).
        t: current timesteps (B,).
        t_next: next timesteps (B,).
    """
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(t, z), alpha_sigma(t_next, z)
    return next_alpha * x0 + next_sigma / sigma * (z - alpha * x0)  # α'·x̂ + σ'·ε̂


def ddim_timesteps(steps: int) -> Tensor:
    """Timesteps of DDIM sampling, from noise to `DATA`: (steps + 1,) float32, highest first.

    They are evenly spaced and rounded to SD's integers: diffusers' timestep spacing ``trailing``. Every second timestep
    of 2·N steps is a timestep of N steps, which distilling two steps into one requires.
    """
    indices = TIMESTEPS - torch.arange(steps + 1, dtype=torch.float64) * (TIMESTEPS / steps)
    return ((indices.round() - 1) / TIMESTEPS).float()


def scheduler(prediction_type: DiffusionPredictionType) -> DPMSolverMultistepScheduler:
    """Diffusers scheduler that takes the same steps as `snapgen.diffusion.process.VariancePreserving.sample`.

    A first-order DPM-Solver is DDIM. Diffusers' own ``DDIMScheduler`` always steps by ⌊1000 / steps⌋ timesteps and
    therefore misses its own timesteps if ``steps`` does not divide 1000, e.g. 16 and 32.
    """
    from diffusers import DPMSolverMultistepScheduler  # slow to import

    return DPMSolverMultistepScheduler(
        **SCHEDULE,
        solver_order=1,
        prediction_type="epsilon" if prediction_type == "noise" else "v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


@functools.cache
def _schedule(device: torch.device) -> Tensor:
    """Table of α and σ by timestep index, starting at −1: (2, 1001) float32."""
    from diffusers import DDIMScheduler  # slow to import

    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()  # ᾱ = α²
    alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
    return torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()]).float().to(device)
