"""The flow-matching objective, with optional knowledge distillation.

An objective is a module whose ``forward(batch)`` returns scalars on the batch's device: ``loss`` is minimized, the
others are logged. It trains its own parameters that require gradients. Modules that it uses without training them, such
as a teacher, are kept in a tuple so that torch does not register them as submodules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import PredictionType, make_process
from snapgen.models import subnetworks
from snapgen.models.unet import UNet
from snapgen.objectives.knowledge_distillation import FeatureProjector, timestep_aware_loss
from snapgen.objectives.teacher import Teacher
from snapgen.training.batches import Batch

if TYPE_CHECKING:
    from snapgen.training.settings import DistillationConfig


class StudentPass(NamedTuple):
    """Results of the student's forward pass on a batch."""

    sample: Tensor
    """Noised latents x_t: (B, C, H, W)."""
    velocity: Tensor
    """The student's velocity, or whatever its noise process predicts: (B, C, H, W)."""
    loss: Tensor
    """Total loss of each image: (B,)."""
    terms: dict[str, Tensor]
    """Losses by name, of which the total is made: (B,) each."""


class FlowMatchingObjective(nn.Module):
    """Trains the student to denoise, on the data alone or also on a teacher's outputs and features.

    With timestep-aware scaling the total is S(task, output) + S(task, features), where S is
    `snapgen.objectives.knowledge_distillation.timestep_aware_loss` (SnapGen, section 4). With fixed scaling the losses
    are weighted and summed.

    Args:
        student: the net that is trained. It may be a `Teacher`, but a `Teacher` cannot be distilled into.
        prediction: what the student's output stands for, which selects the noise process
            (`snapgen.diffusion.process`); a teacher requires rectified flow.
        distillation: the distillation losses; requires ``teacher``.
        teacher: frozen; neither copied nor moved, so it must be on the batches' device.
        block_dropout: probability of leaving each of the student's blocks out of a step.
        seed: seed of the projector's weights.
    """

    def __init__(
        self,
        student: UNet | Teacher,
        *,
        prediction: PredictionType,
        distillation: DistillationConfig | None = None,
        teacher: Teacher | None = None,
        block_dropout: float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert (distillation is None) == (teacher is None), "distillation and its teacher come together"
        assert teacher is None or not any(weight.requires_grad for weight in teacher.parameters())
        self.student, self.process, self.distillation = student, make_process(prediction), distillation
        self._teacher, self._block_dropout = (teacher,), block_dropout
        self.projector: FeatureProjector | None = None
        if distillation is not None and distillation.features:
            assert teacher is not None
            assert isinstance(student, UNet)
            channels, stride = student.arch.up[0].channels, teacher.patch_size
            self.projector = FeatureProjector(channels, teacher.hidden_dim, stride, seed=seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` and the losses it is made of: ``task``, ``output``, ``features``."""
        if self._block_dropout:
            assert isinstance(self.student, UNet)
            subnetworks.sample_block_dropout(
                self.student, self._block_dropout, seed=batch.random.seed, step=batch.random.step
            )
        result = self.student_pass(batch)
        return {"loss": result.loss.mean(), **batch_means(result.terms)}

    def student_pass(self, batch: Batch) -> StudentPass:
        """Run the student on a batch and compute its losses."""
        x = self.process.add_noise(batch.latents, batch.noise, batch.t)
        velocity, features = self._predict(x, batch)
        # L_task = ‖v_θ(x_t, t, c) − v‖², per image
        task = rectified_flow.mse_per_image(velocity, self.process.target(batch.latents, batch.noise, batch.t))
        kd_losses = self._kd_losses(x, batch, velocity, features)
        return StudentPass(x, velocity, self._total(task, kd_losses, batch.t), {"task": task, **kd_losses})

    def _predict(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The student's velocity (B, C, H, W), and its features if there is a projector for them."""
        student, features = self.student, []

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            if isinstance(student, Teacher):
                return student(x, t, context, batch.pooled)  # type: ignore[no-any-return]
            if self.projector is None:
                return student(x, t, context)  # type: ignore[no-any-return]
            features.append(student.forward_features(x, t, context))
            return student.head(features[0])

        return self.process.predict(net, x, batch.t, batch.context), features

    def _kd_losses(self, x: Tensor, batch: Batch, velocity: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        """Distillation losses by name: (B,) each."""
        (teacher,) = self._teacher
        if self.distillation is None or teacher is None:
            return {}
        assert batch.teacher is not None, "the batches have no captions for the teacher"
        blocks = [teacher.num_layers - 1] if self.projector is not None else []
        with torch.no_grad():
            teacher_velocity, teacher_tokens = teacher.forward_features(
                x, batch.t, batch.teacher, blocks, guidance=self.distillation.guidance_scale, null=batch.teacher_null
            )
        kd_losses = {}
        if self.distillation.output:  # L_kd = ‖v_T(x_t, t) − v_θ(x_t, t)‖²
            kd_losses["output"] = rectified_flow.mse_per_image(velocity, teacher_velocity)
        if self.projector is not None:  # L_featkd = ‖f_T(x_t, t) − φ(f_θ(x_t, t))‖²
            kd_losses["features"] = rectified_flow.mse_per_image(self.projector(features[0]), teacher_tokens[0])
        return kd_losses

    def _total(self, task: Tensor, kd_losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Total loss of each image: (B,)."""
        if self.distillation is None or not kd_losses:
            return task
        if self.distillation.scaling == "timestep_aware":  # S(L_task, L_kd) + S(L_task, L_featkd)
            return torch.stack([timestep_aware_loss(task, kd, t) for kd in kd_losses.values()]).sum(0)
        weights = {"output": self.distillation.output_weight, "features": self.distillation.feature_weight}
        return torch.stack([task, *(weights[name] * kd for name, kd in kd_losses.items())]).sum(0)


def batch_means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each loss averaged over the batch and detached, for the log."""
    return {name: loss.detach().mean() for name, loss in losses.items()}
