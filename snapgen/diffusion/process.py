"""Between data and noise: the two processes that nets are trained on, behind one face.

What a recipe calls its *prediction* says both what the net's output stands for and which process it is of: rectified
flow (`snapgen.diffusion.rectified_flow`) or SD-1.5's variance-preserving diffusion
(`snapgen.diffusion.variance_preserving`). `make_process` gives the process; whoever trains, judges, samples or exports
asks it, and nobody else decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from snapgen.diffusion import rectified_flow, variance_preserving
from snapgen.diffusion.rectified_flow import Denoiser
from snapgen.seeding import derive_seed

PredictionType = Literal[rectified_flow.FlowPredictionType, variance_preserving.DiffusionPredictionType]
PREDICTION_TYPES = (*rectified_flow.FLOW_PREDICTION_TYPES, *variance_preserving.DIFFUSION_PREDICTION_TYPES)
Scheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler

VELOCITY = {
    "velocity": "v = unet(x, t)",
    "data": f"v = (x - unet(x, t)) / max(t, {rectified_flow.SMALLEST_T})",
    "preconditioned": "s = 1 / sqrt(t^2 + (1 - t)^2); v = (2 t - 1) s^2 x + s unet(s x, t)",
}
"""`snapgen.diffusion.rectified_flow.predict_velocity`, for a reader of an exported pipeline's JSON."""


class NoiseProcess(ABC):
    """One process with one prediction; timesteps t are numbers the nets take, highest where the noise is.

    Shapes: data, noise and samples (B, C, H, W), timesteps (B,), contexts (B, N, width) or None.
    """

    @abstractmethod
    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The sample between data and noise."""

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `said` is to be."""

    @abstractmethod
    def said(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """What a net says of a sample, in the form in which it is guided, taught and stepped with."""

    @abstractmethod
    def guided(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, guidance: float) -> Tensor:
        """As `said`, with classifier-free guidance; 1: none."""

    @abstractmethod
    def times(self, quantile: Tensor) -> Tensor:
        """The timesteps of training at quantiles of their distribution: (B,) → (B,)."""

    @abstractmethod
    def sample(self, net: Denoiser, noise: Tensor, context: Tensor | None, *, steps: int, guidance: float) -> Tensor:
        """From noise to data."""

    @abstractmethod
    def scheduler(self) -> Scheduler:
        """Diffusers' scheduler that takes the steps of `sample`, given what `guided` gives."""

    @abstractmethod
    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """Set a scheduler to so many steps."""

    @abstractmethod
    def described(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """How to sample, for whoever runs an exported net: formulas, and the numbers of so many steps."""

    def losses(self, net: Denoiser, data: Tensor, noise: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Squared error of what a net says, mean over each image's elements: (B,) float32."""
        said = self.said(net, self.noised(data, noise, t), t, context)
        return rectified_flow.mse_per_image(said, self.target(data, noise, t))

    @torch.no_grad()
    def validation_losses(
        self, net: Denoiser, data: Tensor, context: Tensor | None, *, seed: int, batch: int = 128
    ) -> Tensor:
        """As `snapgen.diffusion.rectified_flow.validation_losses`: the loss of each of a fixed set of (t, noise) pairs,
        (N,) float64."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "validation t"))
        times = self.times(rectified_flow.stratified(len(data), generator))

        def loss(data: Tensor, noise: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            return self.losses(net, data, noise, t, context)

        return rectified_flow.losses_over_pairs(loss, data, context, times, seed=seed, batch=batch)


class RectifiedFlow(NoiseProcess):
    """`snapgen.diffusion.rectified_flow`; what a net says is its velocity.

    Args:
        prediction: what its output stands for.
        shift: of the timesteps towards noise, in training and sampling.
    """

    def __init__(self, prediction: rectified_flow.FlowPredictionType = "velocity", shift: float = 1) -> None:
        self.prediction, self.shift = prediction, shift

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return rectified_flow.interpolate(data, noise, t)

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002 - the same at all of them
        return noise - data

    def said(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return rectified_flow.predict_velocity(net, x, t, context, self.prediction)

    def guided(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, guidance: float) -> Tensor:
        return rectified_flow.guided_velocity(net, x, t, context, guidance, self.prediction)

    def times(self, quantile: Tensor) -> Tensor:
        """Logit-normal, moved by the shift (SD3, section 3.1 and 5.3.2)."""
        return rectified_flow.shift_timesteps(rectified_flow.logit_normal(quantile), self.shift)

    def sample(self, net: Denoiser, noise: Tensor, context: Tensor | None, *, steps: int, guidance: float) -> Tensor:
        return rectified_flow.sample(
            net, noise, context, steps=steps, guidance=guidance, prediction=self.prediction, shift=self.shift
        )

    def scheduler(self) -> Scheduler:
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)

    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """To σ from 1 to 0, which are t, even before the shift."""
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)

    def described(self, scheduler: Any, steps: int) -> dict[str, Any]:
        self.set_steps(scheduler, steps)
        return {
            "each step": "t = sigmas[i]; x = x + (sigmas[i + 1] - sigmas[i]) v",
            "velocity": VELOCITY[self.prediction],
            "guided velocity": "v = v(zeros) + guidance (v(context) - v(zeros)); with guidance 1 v(context) alone",
            "shift": scheduler.config.shift,
            "sigmas": scheduler.sigmas.tolist(),
        }


class VariancePreserving(NoiseProcess):
    """`snapgen.diffusion.variance_preserving`; what a net says is v or ε, as it was trained. Its timesteps are never
    shifted."""

    def __init__(self, prediction: variance_preserving.DiffusionPredictionType = "v") -> None:
        self.prediction = prediction

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return variance_preserving.add_noise(data, noise, t)

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return variance_preserving.target(data, noise, t, self.prediction)

    def said(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return net(x, t, context)

    def guided(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None, guidance: float) -> Tensor:
        return variance_preserving.apply_cfg(net, x, t, context, guidance)

    def times(self, quantile: Tensor) -> Tensor:
        """Uniform over SD's integers."""
        return (quantile * variance_preserving.TIMESTEPS).floor() / variance_preserving.TIMESTEPS

    def sample(self, net: Denoiser, noise: Tensor, context: Tensor | None, *, steps: int, guidance: float) -> Tensor:
        return variance_preserving.sample(
            net, noise, context, steps=steps, guidance=guidance, prediction=self.prediction
        )

    def scheduler(self) -> Scheduler:
        return variance_preserving.scheduler(self.prediction)

    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        scheduler.set_timesteps(steps, device=device)

    def described(self, scheduler: Any, steps: int) -> dict[str, Any]:
        self.set_steps(scheduler, steps)
        times = scheduler.timesteps / variance_preserving.TIMESTEPS
        all_times = torch.cat([times, torch.tensor([variance_preserving.DATA])])
        alpha, sigma = variance_preserving.alpha_sigma(all_times, all_times)
        clean = "(x - sigmas[i] v) / alphas[i]" if self.prediction == "noise" else "alphas[i] x - sigmas[i] v"
        return {
            "each step": f"t = times[i]; d = {clean}; e = (x - alphas[i] d) / sigmas[i]; "
            "x = alphas[i + 1] d + sigmas[i + 1] e",
            "velocity": "v = unet(x, t)",
            "guided velocity": "v = guidance v(context) - (guidance - 1) v(zeros); with guidance 1 v(context) alone",
            "times": times.tolist(),
            "alphas": alpha.tolist(),
            "sigmas": sigma.tolist(),
        }


def make_process(prediction: PredictionType, *, shift: float = 1) -> NoiseProcess:
    """The process that a prediction is of; ``shift`` is for rectified flow alone."""
    if prediction in get_args(variance_preserving.DiffusionPredictionType):
        return VariancePreserving(cast(variance_preserving.DiffusionPredictionType, prediction))
    return RectifiedFlow(cast(rectified_flow.FlowPredictionType, prediction), shift)
