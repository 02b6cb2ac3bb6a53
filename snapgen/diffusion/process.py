"""Common interface of the two noise processes that nets are trained on.

The *prediction type* determines both the meaning of a net's output and the process: rectified flow
(`snapgen.diffusion.rectified_flow`) or SD-1.5's variance-preserving diffusion
(`snapgen.diffusion.variance_preserving`). Training, evaluation, sampling and export all use the process that
`make_process` returns for a prediction type.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from torch import Tensor

from snapgen.diffusion import rectified_flow, variance_preserving
from snapgen.diffusion.rectified_flow import Denoiser
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    Scheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler

PredictionType = Literal[rectified_flow.FlowPredictionType, variance_preserving.DiffusionPredictionType]
PREDICTION_TYPES = (*rectified_flow.FLOW_PREDICTION_TYPES, *variance_preserving.DIFFUSION_PREDICTION_TYPES)

VELOCITY = {
    "velocity": "v = unet(x, t)",
    "data": f"v = (x - unet(x, t)) / max(t, {rectified_flow.SMALLEST_T})",
    "preconditioned": "s = 1 / sqrt(t^2 + (1 - t)^2); v = (2 t - 1) s^2 x + s unet(s x, t)",
}
"""Formulas of `snapgen.diffusion.rectified_flow.predict_velocity`, for the JSON of an exported pipeline."""


class NoiseProcess(ABC):
    """A noise process with a prediction type; timesteps are in the unit that the nets take, increasing with the noise.

    Shapes: data, noise and samples (B, C, H, W), timesteps (B,), contexts (B, N, dim) or None.
    """

    @abstractmethod
    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy sample at timestep ``t``."""

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Training target of `predict`."""

    @abstractmethod
    def predict(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Prediction of a net for a noisy sample, in the form that guidance, distillation and sampling steps use."""

    @abstractmethod
    def timestep_quantiles(self, quantile: Tensor) -> Tensor:
        """Training timesteps at the given quantiles of their distribution: (B,) → (B,)."""

    @abstractmethod
    def sampling_timesteps(self, steps: int) -> Tensor:
        """Timesteps of `sample`, from noise to data: (steps + 1,), on the CPU."""

    @abstractmethod
    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Step a sample from timestep ``t`` to ``t_next``, both 0-dim and on the CPU."""

    @abstractmethod
    def scheduler(self) -> Scheduler:
        """Diffusers scheduler that takes the steps of `sample` from the output of `predict_guided`."""

    @abstractmethod
    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """Set the number of inference steps of a scheduler."""

    @abstractmethod
    def export_spec(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Formulas and numbers for sampling with an exported net in ``steps`` steps, as written to JSON."""

    @torch.no_grad()
    def sample(
        self,
        net: Denoiser,
        noise: Tensor,
        context: Tensor | None,
        *,
        steps: int,
        guidance: float = 1,
        null: Tensor | None = None,
    ) -> Tensor:
        """Sample data from noise; see `predict_guided` for the guidance."""
        x = noise
        for t, t_next in itertools.pairwise(self.sampling_timesteps(steps)):
            times = t.float().to(x.device).expand(len(x))
            x = self.step(x, self.predict_guided(net, x, times, context, guidance, null), t, t_next)
        return x

    def predict_guided(
        self,
        net: Denoiser,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        guidance: float,
        null: Tensor | None = None,
    ) -> Tensor:
        """`predict` with classifier-free guidance: p_∅ + guidance·(p_c − p_∅), where ∅ is the null caption's context.

        A guidance of 1 takes one evaluation, any other a batch of twice the size. Without a context guidance has no
        effect.

        Args:
            null: context of the null caption (1, N, dim); None: zeros.
        """
        if guidance == 1 or context is None:
            return self.predict(net, x, t, context)
        cond, uncond = self.predict_cond_and_uncond(net, x, t, context, null)
        return torch.lerp(uncond, cond, guidance)

    def predict_cond_and_uncond(
        self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor, null: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`predict` with the context and with the null caption's, from one batch of twice the size."""
        contexts = torch.cat([context, null_like(context, null)])  # (B, N, dim) -> (2·B, N, dim)
        cond, uncond = self.predict(net, torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        return cond, uncond

    def losses(self, net: Denoiser, data: Tensor, noise: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Loss of each image: squared error of the prediction, mean over its elements, (B,) float32."""
        prediction = self.predict(net, self.add_noise(data, noise, t), t, context)
        return rectified_flow.mse_per_image(prediction, self.target(data, noise, t))

    @torch.no_grad()
    def validation_losses(
        self, net: Denoiser, data: Tensor, context: Tensor | None, *, seed: int, batch: int = 128
    ) -> Tensor:
        """Loss of each image at its fixed timestep and noise; their mean is the validation loss.

        Args:
            net: the net, on the device of the data.
            data: images or latents (N, C, H, W).
            context: their contexts (N, tokens, dim), or None.
            seed: determines timesteps and noise, independently of the batch size.
            batch: images per forward pass.

        Returns:
            (N,) float64 on the CPU.
        """
        times, losses = self.validation_times(len(data), seed=seed).to(data.device), []
        for start in range(0, len(data), batch):
            rows = slice(start, min(start + batch, len(data)))
            noise = rectified_flow.per_image_noise(
                range(rows.start, rows.stop), data.shape[1:], seed=seed, name="validation noise"
            )
            batch_context = None if context is None else context[rows]
            losses.append(self.losses(net, data[rows], noise.to(data.device), times[rows], batch_context))
        return torch.cat(losses).double().cpu()

    def validation_times(self, pairs: int, *, seed: int) -> Tensor:
        """Timesteps of the fixed validation pairs: one from each of ``pairs`` strata of the training distribution.

        Strata are assigned to the pairs by a fixed random permutation, so that t does not depend on the order of the
        images.

        Returns:
            (pairs,) float32.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "validation t"))
        return self.timestep_quantiles(rectified_flow.stratified(pairs, generator))


class RectifiedFlow(NoiseProcess):
    """Rectified flow (`snapgen.diffusion.rectified_flow`); `predict` returns the velocity.

    Args:
        prediction_type: meaning of the net's output.
        shift: shift of the timesteps towards noise, in training and sampling.
    """

    def __init__(self, prediction_type: rectified_flow.FlowPredictionType = "velocity", shift: float = 1) -> None:
        self.prediction_type, self.shift = prediction_type, shift

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return rectified_flow.interpolate(data, noise, t)

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002 - it does not depend on t
        return noise - data

    def predict(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return rectified_flow.predict_velocity(net, x, t, context, self.prediction_type)

    def timestep_quantiles(self, quantile: Tensor) -> Tensor:
        """Shifted logit-normal timesteps (SD3, sections 3.1 and 5.3.2)."""
        return rectified_flow.shift_timesteps(rectified_flow.logit_normal(quantile), self.shift)

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Evenly spaced timesteps before the shift."""
        return rectified_flow.shift_timesteps(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.shift)

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """Euler's step: x ← x + (t' − t)·v."""
        return x + float(t_next - t) * prediction

    def scheduler(self) -> Scheduler:
        from diffusers import FlowMatchEulerDiscreteScheduler  # slow to import

        return FlowMatchEulerDiscreteScheduler(shift=self.shift)

    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        """Set σ, which equals t, to evenly spaced values from 1 to 0; the scheduler shifts them."""
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(), device=device)

    def export_spec(self, scheduler: Any, steps: int) -> dict[str, Any]:
        self.set_steps(scheduler, steps)
        return {
            "each step": "t = sigmas[i]; x = x + (sigmas[i + 1] - sigmas[i]) v",
            "velocity": VELOCITY[self.prediction_type],
            "guided velocity": "v = v(null) + guidance (v(context) - v(null)); with guidance 1 v(context) alone",
            "shift": scheduler.config.shift,
            "sigmas": scheduler.sigmas.tolist(),
        }


class VariancePreserving(NoiseProcess):
    """Variance-preserving diffusion (`snapgen.diffusion.variance_preserving`); `predict` returns v or ε.

    Its timesteps are never shifted.

    Args:
        prediction_type: meaning of the net's output.
    """

    def __init__(self, prediction_type: variance_preserving.DiffusionPredictionType = "v") -> None:
        self.prediction_type = prediction_type

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return variance_preserving.add_noise(data, noise, t)

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return variance_preserving.target(data, noise, t, self.prediction_type)

    def predict(self, net: Denoiser, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return net(x, t, context)

    def timestep_quantiles(self, quantile: Tensor) -> Tensor:
        """Timesteps uniform over SD's integers."""
        return (quantile * variance_preserving.TIMESTEPS).floor() / variance_preserving.TIMESTEPS

    def sampling_timesteps(self, steps: int) -> Tensor:
        return variance_preserving.ddim_timesteps(steps)

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """DDIM's step."""
        x0 = variance_preserving.predict_x0(prediction, x, t, self.prediction_type)
        return variance_preserving.ddim_step(x, x0, t, t_next).to(x.dtype)

    def scheduler(self) -> Scheduler:
        return variance_preserving.scheduler(self.prediction_type)

    def set_steps(self, scheduler: Any, steps: int, device: torch.device | None = None) -> None:
        scheduler.set_timesteps(steps, device=device)

    def export_spec(self, scheduler: Any, steps: int) -> dict[str, Any]:
        self.set_steps(scheduler, steps)
        times = scheduler.timesteps / variance_preserving.TIMESTEPS
        all_times = torch.cat([times, torch.tensor([variance_preserving.DATA])])
        alpha, sigma = variance_preserving.alpha_sigma(all_times, all_times)
        x0_formula = "(x - sigmas[i] v) / alphas[i]" if self.prediction_type == "noise" else "alphas[i] x - sigmas[i] v"
        return {
            "each step": f"t = times[i]; d = {x0_formula}; e = (x - alphas[i] d) / sigmas[i]; "
            "x = alphas[i + 1] d + sigmas[i + 1] e",
            "velocity": "v = unet(x, t)",
            "guided velocity": "v = guidance v(context) - (guidance - 1) v(null); with guidance 1 v(context) alone",
            "times": times.tolist(),
            "alphas": alpha.tolist(),
            "sigmas": sigma.tolist(),
        }


def make_process(prediction_type: PredictionType, *, shift: float = 1) -> NoiseProcess:
    """Create the noise process of a prediction type; ``shift`` applies to rectified flow only."""
    if prediction_type in get_args(variance_preserving.DiffusionPredictionType):
        return VariancePreserving(cast(variance_preserving.DiffusionPredictionType, prediction_type))
    return RectifiedFlow(cast(rectified_flow.FlowPredictionType, prediction_type), shift)


def null_like(tensor: Tensor, null: Tensor | None) -> Tensor:
    """The null caption's row (1, …) in the shape of a batch's tensor (B, …), and in its dtype; zeros if it is None."""
    return torch.zeros_like(tensor) if null is None else null.to(tensor).expand_as(tensor)
