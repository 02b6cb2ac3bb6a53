"""Two-to-one distillation: one DDIM step of the student does what two of its teacher's do (arXiv 2202.00512), with the
guidance seen to (SnapFusion, arXiv 2306.00980, section 4).

The teacher goes from z_t by two of its steps, t → t' → t'', to z''. The student's one step from z_t lands there if its
x̂ is x̃ = (z'' − (σ''/σ)·z_t) / (α'' − (σ''/σ)·α). Its losses, image by image (squared errors are means over elements
here, as everywhere in this package):

- vanilla: max(α²/σ², 1)·‖x̂ − x̃‖², neither guided;
- CFG-aware: the same with the v of both nets, the teacher's in both of its steps, replaced by
  ṽ = w·v(z, c) − (w − 1)·v(z, ∅) with one w an image, drawn evenly from a range (the paper's is 2 to 14);
- total: L_dstl + γ·(L_dstl / L_ori)·L_ori with γ = 0.2 and no gradient through the ratio; L_dstl is the CFG-aware
  loss with probability p = 0.1, L_ori what the student's net is trained by without a teacher.

The paper leaves open, so it is our choice: that the draw of p is a step's and not an image's, that L_ori is taken at
the same z_t from the same evaluation, that its ratio is an image's own, and that w is stratified.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from snapgen.diffusion import rectified_flow, variance_preserving
from snapgen.models.unet import UNet
from snapgen.objectives.flow_matching import means
from snapgen.objectives.knowledge_distillation import SMALLEST
from snapgen.training.batches import Batch
from snapgen.training.stages import ProgressiveDistillationStage


class ProgressiveDistillationObjective(nn.Module):
    """The student learns to take in one DDIM step what its teacher takes in two.

    The batch's timesteps are those that the student's sampler visits, but for the end.

    Args:
        student: the net that is trained.
        teacher: frozen; of the same prediction. Neither copied nor moved: it must be on the batches' device.
        stage: the settings.
        prediction: what both nets' outputs stand for.
    """

    visited: Tensor

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
        self._teacher = (teacher,)
        self.register_buffer("visited", variance_preserving.ddim_timesteps(stage.teacher_steps), persistent=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the student alone: what is guided and what is not is decided on the way."""
        self.student.compile(*args, **kwargs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and of what it is made: ``distillation`` and, before it is scaled, ``original``."""
        z, t = variance_preserving.add_noise(batch.latents, batch.noise, batch.t), batch.t
        scale = self.guidance(batch)
        said, told = self._said(self.student, z, t, batch.context, scale)
        wanted = self.taught(z, t, batch.context, scale)
        distilled = truncated_snr(t, z) * rectified_flow.mse_per_image(
            variance_preserving.predict_x0(said, z, t, self.prediction), wanted
        )
        target = variance_preserving.target(batch.latents, batch.noise, t, self.prediction)
        original = rectified_flow.mse_per_image(told, target)
        ratio = (distilled / original.clamp(min=SMALLEST)).detach()
        loss = distilled + self.stage.original * ratio * original
        return {"loss": loss.mean(), **means({"distillation": distilled, "original": original})}

    def guidance(self, batch: Batch) -> Tensor | None:
        """w of each image, (B, 1, 1, 1), if this is a CFG-aware step."""
        if batch.context is None or batch.draws.chance("guided") >= self.stage.probability:
            return None
        low, high = self.stage.guidance
        return (low + (high - low) * batch.draws.quantiles("guidance", batch.latents.device)).view(-1, 1, 1, 1)

    @torch.no_grad()
    def taught(self, z: Tensor, t: Tensor, context: Tensor | None, scale: Tensor | None) -> Tensor:
        """x̃, the student's x̂ with which its step lands where the teacher's two do: (B, C, H, W)."""
        (teacher,) = self._teacher
        between, end = self._next(t)
        x = z
        for now, then in ((t, between), (between, end)):
            said, _ = self._said(teacher, x, now, context, scale)
            x = variance_preserving.ddim_step(
                x, variance_preserving.predict_x0(said, x, now, self.prediction), now, then
            )
        return x0_for_one_step(z, x, t, end)

    def _next(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t' and t'', the teacher's next timesteps: (B,) each."""
        steps = self.stage.teacher_steps
        # t lies within half a timestep of evenly spaced, which is less than half a step of the student's.
        place = 2 * ((1 + variance_preserving.DATA - t) * steps / 2).round().long()
        return self.visited[place + 1], self.visited[place + 2]

    def _said(
        self, net: UNet, z: Tensor, t: Tensor, context: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What a net says, guided if there is a scale, and what it says with the context alone; float32."""
        if scale is None or context is None:
            said = cast(Tensor, net(z, t, context)).float()
            return said, said
        told, untold = (half.float() for half in variance_preserving.cond_and_uncond(net, z, t, context))
        return scale * told - (scale - 1) * untold, told


def x0_for_one_step(z: Tensor, reached: Tensor, t: Tensor, end: Tensor) -> Tensor:
    """x̃ = (z'' − (σ''/σ)·z_t) / (α'' − (σ''/σ)·α): the x̂ with which one DDIM step from z_t lands at z''."""
    (alpha, sigma), (end_alpha, end_sigma) = (
        variance_preserving.alpha_sigma(t, z),
        variance_preserving.alpha_sigma(end, z),
    )
    ratio = end_sigma / sigma
    return (reached - ratio * z) / (end_alpha - ratio * alpha)


def truncated_snr(t: Tensor, like: Tensor) -> Tensor:
    """max(α²/σ², 1), the truncated signal-to-noise ratio: (B,) → (B,)."""
    alpha, sigma = variance_preserving.alpha_sigma(t, like)
    return (alpha / sigma).square().clamp(min=1).flatten()
