"""What a stage of training minimises.

An objective is an ordered mapping of names to *turns*. A turn is a module whose ``forward(batch)`` gives scalars on the
batch's device: ``loss`` is minimised, the others are for the log. It trains its own parameters that require gradients;
what it only uses, a teacher for one, it holds in a tuple, which torch does not register.
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
    from snapgen.training.stages import DistillationConfig


class StudentPass(NamedTuple):
    """What a pass of the student through a batch gives."""

    sample: Tensor
    """x_t: (B, C, H, W)."""
    velocity: Tensor
    """The student's, or what else its process has it say: (B, C, H, W)."""
    loss: Tensor
    """(B,)."""
    parts: dict[str, Tensor]
    """The losses that it is made of: (B,) each."""


class FlowMatchingObjective(nn.Module):
    """The student learns to undo noise from the data, and from a teacher if there is one.

    The total is S(task, output) + S(task, features), S being
    `snapgen.objectives.knowledge_distillation.timestep_aware_loss` (SnapGen, section 4); without scaling the losses are
    weighted and added.

    Args:
        student: the net that is trained; a `Teacher` can be one, but not be distilled into.
        prediction: what its output stands for, and so the process (`snapgen.diffusion.process`); with a teacher
        rectified flow. distillation: how it is taught; needs ``teacher``. teacher: frozen. Neither copied nor moved: it
        must be on the batches' device. block_dropout: how often each of the student's blocks is left out for a step.
        seed: of the projector's weights.
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
            self.projector = FeatureProjector(student.arch.up[0].channels, teacher.width, teacher.patch, seed=seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, and of what it is made: ``task``, ``output``, ``features``."""
        if self._block_dropout:
            assert isinstance(self.student, UNet)
            subnetworks.sample_block_dropout(
                self.student, self._block_dropout, seed=batch.draws.seed, step=batch.draws.step
            )
        lesson = self.lesson(batch)
        return {"loss": lesson.loss.mean(), **means(lesson.parts)}

    def lesson(self, batch: Batch) -> StudentPass:
        """The student's pass through a batch, and how well it did."""
        x = self.process.noised(batch.latents, batch.noise, batch.t)
        velocity, features = self._said(x, batch)
        task = rectified_flow.mse_per_image(velocity, self.process.target(batch.latents, batch.noise, batch.t))
        taught = self._taught(x, batch, velocity, features)
        return StudentPass(x, velocity, self._total(task, taught, batch.t), {"task": task, **taught})

    def _said(self, x: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The student's velocity, and its features if there is a projector for them."""
        student, features = self.student, []

        def net(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            if isinstance(student, Teacher):
                return student(x, t, context, batch.pooled)  # type: ignore[no-any-return]
            if self.projector is None:
                return student(x, t, context)  # type: ignore[no-any-return]
            features.append(student.trunk(x, t, context))
            return student.head(features[0])

        return self.process.said(net, x, batch.t, batch.context), features

    def _taught(self, x: Tensor, batch: Batch, velocity: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        """How far the student is from its teacher: (B,) each."""
        (teacher,) = self._teacher
        if self.distillation is None or teacher is None:
            return {}
        assert batch.teacher is not None, "the feed gives the teacher's captions"
        blocks = [teacher.depth - 1] if self.projector is not None else []
        with torch.no_grad():
            wanted, tokens = teacher.observe(x, batch.t, batch.teacher, blocks, guidance=self.distillation.guidance)
        found = {}
        if self.distillation.output:
            found["output"] = rectified_flow.mse_per_image(velocity, wanted)
        if self.projector is not None:
            found["features"] = rectified_flow.mse_per_image(self.projector(features[0]), tokens[0])
        return found

    def _total(self, task: Tensor, taught: dict[str, Tensor], t: Tensor) -> Tensor:
        """(B,)."""
        if self.distillation is None or not taught:
            return task
        if self.distillation.scaling == "timestep":
            return torch.stack([timestep_aware_loss(task, kd, t) for kd in taught.values()]).sum(0)
        weights = {"output": self.distillation.output_weight, "features": self.distillation.feature_weight}
        return torch.stack([task, *(weights[name] * kd for name, kd in taught.items())]).sum(0)


def means(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each part's mean over the batch, for the log."""
    return {name: part.detach().mean() for name, part in parts.items()}
