"""What a stage trains, and by which losses: its turns, as `snapgen.training.loop` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from snapgen.diffusion import process, rectified_flow, variance_preserving
from snapgen.models.unet import UNet
from snapgen.objectives import adversarial
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
    teaches: Teacher | UNet | None,
    *,
    prediction: process.PredictionType,
    seed: int,
) -> tuple[dict[str, nn.Module], Mapping[str, OptimizerConfig]]:
    """The turns of a stage by name, and the settings of a turn's optimizer where they are not the stage's.

    Args:
        net: what the stage trains.
        teaches: the frozen teacher, if the stage has a use for it.
        prediction: what the output of a U-Net stands for; a teacher says so itself.
        seed: of the stage.

    Raises:
        InputError: if the teacher has no such blocks as the discriminator is to look at.
    """
    if isinstance(stage, ProgressiveDistillationStage):
        assert isinstance(net, UNet)
        assert isinstance(teaches, UNet)
        both = cast(variance_preserving.DiffusionPredictionType, prediction)
        return {"student": ProgressiveDistillationObjective(net, teacher=teaches, stage=stage, prediction=both)}, {}
    assert not isinstance(teaches, UNet)
    if isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None:
        assert isinstance(net, UNet)
        assert teaches is not None
        found = adversarial.build_adversarial_objectives(
            net,
            prediction=cast(rectified_flow.FlowPredictionType, prediction),
            adversarial=stage.adversarial,
            distillation=stage.distillation,
            teacher=teaches,
            seed=seed,
        )
        critic = {"learning_rate": stage.adversarial.learning_rate, "optimizer": "adamw"}
        return found, {"critic": stage.model_copy(update=critic)}
    if isinstance(net, Teacher):
        prediction = net.prediction
    dropout = stage.block_dropout if isinstance(stage, FlowMatchingStage) else 0
    turn = FlowMatchingObjective(
        net,
        prediction=prediction,
        distillation=stage.distillation,
        teacher=teaches,
        block_dropout=dropout,
        seed=seed,
    )
    return {"student": turn}, {}
