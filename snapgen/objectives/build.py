"""Builds the objectives of a training stage, for `snapgen.training.loop`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from snapgen.diffusion import process, rectified_flow, variance_preserving
from snapgen.models.unet import UNet
from snapgen.objectives.adversarial import AdversarialObjective, DiscriminatorObjective, FeatureDiscriminator
from snapgen.objectives.flow_matching import FlowMatchingObjective
from snapgen.objectives.progressive import ProgressiveDistillationObjective
from snapgen.objectives.teacher import Teacher
from snapgen.optim.config import OptimizerConfig
from snapgen.training.stages import (
    AdversarialDistillationStage,
    FlowMatchingStage,
    NetStage,
    ProgressiveDistillationStage,
)


def build_objectives(
    stage: NetStage,
    net: UNet | Teacher,
    teacher: Teacher | UNet | None,
    *,
    prediction: process.PredictionType,
    seed: int,
) -> tuple[dict[str, nn.Module], Mapping[str, OptimizerConfig]]:
    """The objectives of a stage by name in training order, and optimizer configurations other than the stage's.

    Args:
        stage: the stage's configuration.
        net: the net that the stage trains.
        teacher: the frozen teacher, if the stage uses one.
        prediction: what the output of a U-Net stands for; a `Teacher` has its own prediction type.
        seed: seed of the stage.

    Raises:
        InputError: if the teacher does not have the blocks that the discriminator uses.
    """
    if isinstance(stage, ProgressiveDistillationStage):
        assert isinstance(net, UNet)
        assert isinstance(teacher, UNet)
        diffusion_type = cast(variance_preserving.DiffusionPredictionType, prediction)
        progressive = ProgressiveDistillationObjective(net, teacher=teacher, stage=stage, prediction=diffusion_type)
        return {"student": progressive}, {}
    assert not isinstance(teacher, UNet)
    if isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None:
        assert isinstance(net, UNet)
        assert teacher is not None
        discriminator = FeatureDiscriminator(teacher, stage.adversarial, seed=seed)
        student = AdversarialObjective(
            net,
            discriminator=discriminator,
            adversarial=stage.adversarial,
            prediction=cast(rectified_flow.FlowPredictionType, prediction),
            distillation=stage.distillation,
            teacher=None if stage.distillation is None else teacher,
            seed=seed,
        )
        # The discriminator's metrics and checkpoints are stored as those of the ``critic``.
        critic = DiscriminatorObjective(discriminator, student, r1=stage.adversarial.r1)
        overrides = {"learning_rate": stage.adversarial.learning_rate, "optimizer": "adamw"}
        return {"student": student, "critic": critic}, {"critic": stage.model_copy(update=overrides)}
    if isinstance(net, Teacher):
        prediction = net.prediction
    block_dropout = stage.block_dropout if isinstance(stage, FlowMatchingStage) else 0
    flow_matching = FlowMatchingObjective(
        net,
        prediction=prediction,
        distillation=stage.distillation,
        teacher=teacher,
        block_dropout=block_dropout,
        seed=seed,
    )
    return {"student": flow_matching}, {}
