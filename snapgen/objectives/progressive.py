"""Progressive distillation of two DDIM steps into one (arXiv 2202.00512), aware of classifier-free guidance
(SnapFusion, arXiv 2306.00980, section 4).

The teacher takes two DDIM steps from z_t, t → t' → t'', to z''. The student's single step from z_t ends at z'' if its
x̂ is x̃ = (z'' − (σ''/σ)·z_t) / (α'' − (σ''/σ)·α). The losses of each image (squared errors are means over elements
here, as everywhere in this package):

- vanilla: max(α²/σ², 1)·‖x̂ − x̃‖², without guidance;
- CFG-aware: the same with the v of both nets, the teacher's in both of its steps, replaced by
  ṽ = w·v(z, c) − (w − 1)·v(z, ∅), with one w per image drawn uniformly from a range (2 to 14 in the paper);
- total: L_dstl + γ·(L_dstl / L_ori)·L_ori with γ = 0.2 and no gradient through the ratio. L_dstl is the CFG-aware
  loss with probability p = 0.1, otherwise the vanilla one; L_ori is the student's loss without a teacher.

The paper does not say the following, which is our choice: p is drawn once per step rather than per image, L_ori is
computed at the same z_t from the same forward pass, its ratio is computed per image, and w is stratified.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from snapgen.diffusion import rectified_flow, variance_preserving
from snapgen.diffusion.process import VariancePreserving
from snapgen.models.unet import UNet
from snapgen.objectives.flow_matching import batch_means
from snapgen.objectives.knowledge_distillation import MIN_DENOMINATOR
from snapgen.training.batches import Batch
from snapgen.training.stages import ProgressiveDistillationStage


class ProgressiveDistillationObjective(nn.Module):
    """Trains the student to do in one DDIM step what its teacher does in two.

    The batch's timesteps are those that the student's sampler visits, without the last one.

    Args:
        student: the net that is trained.
        teacher: frozen, with the same prediction type; neither copied nor moved, so it must be on the batches' device.
        stage: the stage's configuration.
        prediction: what both nets' outputs stand for.
    """

    teacher_timesteps: Tensor
    """Timesteps of the teacher's sampler: (teacher_steps + 1,)."""

    def __init__(
        self,
        student: UNet,
        *,
        teacher: UNet,
        stage: ProgressiveDistillationStage,
        prediction: variance_preserving.DiffusionPredictionType = "v",
    ) -> None:
        super().__init__()
        assert not any(weight.requires_grad for weight in teacher.parameters())
        self.student, self.prediction, self.stage = student, prediction, stage
        self._process = VariancePreserving(prediction)
        self._teacher = (teacher,)
        timesteps = variance_preserving.ddim_timesteps(stage.teacher_steps)
        self.register_buffer("teacher_timesteps", timesteps, persistent=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile only the student: whether a step is guided is decided in `forward`."""
        self.student.compile(*args, **kwargs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` and the losses it is made of: ``distillation`` and, before it is scaled, ``original``."""
        z, t = variance_preserving.add_noise(batch.latents, batch.noise, batch.t), batch.t
        scale = self.guidance_scale(batch)
        null = None if batch.null is None else batch.null.context
        guided, conditional = self._predict(self.student, z, t, batch.context, scale, null)
        target_x0 = self.target_x0(z, t, batch.context, scale, null)
        # L_dstl = max(α²/σ², 1)·‖x̂ − x̃‖²
        distilled = truncated_snr(t, z) * rectified_flow.mse_per_image(
            variance_preserving.predict_x0(guided, z, t, self.prediction), target_x0
        )
        target = variance_preserving.target(batch.latents, batch.noise, t, self.prediction)
        original = rectified_flow.mse_per_image(conditional, target)  # L_ori
        ratio = (distilled / original.clamp(min=MIN_DENOMINATOR)).detach()
        loss = distilled + self.stage.original_loss_weight * ratio * original  # L_dstl + γ·(L_dstl / L_ori)·L_ori
        return {"loss": loss.mean(), **batch_means({"distillation": distilled, "original": original})}

    def guidance_scale(self, batch: Batch) -> Tensor | None:
        """Guidance scale w of each image, (B, 1, 1, 1), or None if this is not a CFG-aware step."""
        if batch.context is None or batch.random.chance("guided") >= self.stage.cfg_probability:
            return None
        low, high = self.stage.cfg_range
        return (low + (high - low) * batch.random.quantiles("guidance", batch.latents.device)).view(-1, 1, 1, 1)

    @torch.no_grad()
    def target_x0(
        self, z: Tensor, t: Tensor, context: Tensor | None, scale: Tensor | None, null: Tensor | None = None
    ) -> Tensor:
        """The target x̃: the x̂ with which the student's one step ends where the teacher's two do. (B, C, H, W)."""
        (teacher,) = self._teacher
        middle, end = self._next_timesteps(t)
        x = z
        for start, stop in ((t, middle), (middle, end)):
            guided, _ = self._predict(teacher, x, start, context, scale, null)
            x = variance_preserving.ddim_step(
                x, variance_preserving.predict_x0(guided, x, start, self.prediction), start, stop
            )
        return x0_for_one_step(z, x, t, end)

    def _next_timesteps(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's next two timesteps t' and t'' after t: (B,) each."""
        steps = self.stage.teacher_steps
        # Timesteps are rounded to the training grid: t is off an even spacing by at most half a training timestep, less
        # than half a step of the student, so rounding finds the student's step.
        index = 2 * ((1 + variance_preserving.DATA - t) * steps / 2).round().long()
        return self.teacher_timesteps[index + 1], self.teacher_timesteps[index + 2]

    def _predict(
        self, net: UNet, z: Tensor, t: Tensor, context: Tensor | None, scale: Tensor | None, null: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A net's output, guided if there is a scale, and its conditional output; both (B, C, H, W) float32."""
        if scale is None or context is None:
            output = cast(Tensor, net(z, t, context)).float()
            return output, output
        cond, uncond = (half.float() for half in self._process.predict_cond_and_uncond(net, z, t, context, null))
        return scale * cond - (scale - 1) * uncond, cond  # ṽ = w·v(z, c) − (w − 1)·v(z, ∅)


def x0_for_one_step(z: Tensor, z_end: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """x̃ = (z'' − (σ''/σ)·z_t) / (α'' − (σ''/σ)·α): the x̂ with which one DDIM step from z_t ends at z''."""
    (alpha, sigma), (end_alpha, end_sigma) = (
        variance_preserving.alpha_sigma(t, z),
        variance_preserving.alpha_sigma(end, z),
    )
    ratio = end_sigma / sigma
    return (z_end - ratio * z) / (end_alpha - ratio * alpha)


def truncated_snr(t: Tensor, reference: Tensor) -> Tensor:
    """Truncated signal-to-noise ratio max(α²/σ², 1), on the device of ``reference``: (B,) → (B,)."""
    alpha, sigma = variance_preserving.alpha_sigma(t, reference)
    return (alpha / sigma).square().clamp(min=1).flatten()
