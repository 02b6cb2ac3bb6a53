"""What a stage trains, and by which losses: its turns, as `snapgen.training.loop` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from snapgen.diffusion import process
from snapgen.diffusion import rectified_flow as flow
from snapgen.diffusion import variance_preserving as diffusion
from snapgen.models.unet import UNet
from snapgen.objectives import adversarial as adversary
from snapgen.objectives.flow_matching import FlowTurn
from snapgen.objectives.progressive import HalvingTurn
from snapgen.objectives.teacher import Teacher
from snapgen.optim.config import Optimisation
from snapgen.training.stages import FlowStage, HalvingStage, NetStage, StepStage


def turns(
    stage: NetStage,
    net: UNet | Teacher,
    teaches: Teacher | UNet | None,
    *,
    prediction: process.Prediction,
    seed: int,
) -> tuple[dict[str, nn.Module], Mapping[str, Optimisation]]:
    """The turns of a stage by name, and the settings of a turn's optimizer where they are not the stage's.

    Args:
        net: what the stage trains.
        teaches: the frozen teacher, if the stage has a use for it.
        prediction: what the output of a U-Net stands for; a teacher says so itself.
        seed: of the stage.

    Raises:
        InputError: if the teacher has no such blocks as the discriminator is to look at.
    """
    if isinstance(stage, HalvingStage):
        assert isinstance(net, UNet)
        assert isinstance(teaches, UNet)
        both = cast(diffusion.Prediction, prediction)
        return {"student": HalvingTurn(net, teacher=teaches, stage=stage, prediction=both)}, {}
    assert not isinstance(teaches, UNet)
    if isinstance(stage, StepStage) and stage.adversarial is not None:
        assert isinstance(net, UNet)
        assert teaches is not None
        found = adversary.turns(
            net,
            prediction=cast(flow.Prediction, prediction),
            adversarial=stage.adversarial,
            distillation=stage.distillation,
            teacher=teaches,
            seed=seed,
        )
        critic = {"learning_rate": stage.adversarial.learning_rate, "optimizer": "adamw"}
        return found, {"critic": stage.model_copy(update=critic)}
    if isinstance(net, Teacher):
        prediction = net.prediction
    dropout = stage.block_dropout if isinstance(stage, FlowStage) else 0
    turn = FlowTurn(
        net,
        prediction=prediction,
        distillation=stage.distillation,
        teacher=teaches,
        block_dropout=dropout,
        seed=seed,
    )
    return {"student": turn}, {}
