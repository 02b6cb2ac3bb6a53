"""What a stage trains, and by which losses: its turns, as `snapgen.loop` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from snapgen import adversary, diffusion, flow
from snapgen.halving import HalvingTurn
from snapgen.objectives import FlowTurn
from snapgen.stages import FlowStage, HalvingStage, NetStage, StepStage
from snapgen.teacher import Teacher
from snapgen.training import Optimisation
from snapgen.unet import UNet
from studies.recipe import Recipe


def turns(
    recipe: Recipe, stage: NetStage, net: UNet | Teacher, teaches: Teacher | UNet | None, *, seed: int
) -> tuple[dict[str, nn.Module], Mapping[str, Optimisation]]:
    """The turns of a stage by name, and the settings of a turn's optimizer where they are not the stage's.

    Args:
        net: what the stage trains.
        teaches: the frozen teacher, if the stage has a use for it.
        seed: of the stage.

    Raises:
        InputError: if the teacher has no such blocks as the discriminator is to look at.
    """
    if isinstance(stage, HalvingStage):
        assert isinstance(net, UNet)
        assert isinstance(teaches, UNet)
        both = cast(diffusion.Prediction, recipe.prediction)
        return {"student": HalvingTurn(net, teacher=teaches, stage=stage, prediction=both)}, {}
    assert not isinstance(teaches, UNet)
    if isinstance(stage, StepStage) and stage.adversarial is not None:
        assert isinstance(net, UNet)
        assert teaches is not None
        found = adversary.turns(
            net,
            prediction=cast(flow.Prediction, recipe.prediction),
            adversarial=stage.adversarial,
            distillation=stage.distillation,
            teacher=teaches,
            seed=seed,
        )
        critic = {"learning_rate": stage.adversarial.learning_rate, "optimizer": "adamw"}
        return found, {"critic": stage.model_copy(update=critic)}
    prediction = net.prediction if isinstance(net, Teacher) else recipe.prediction
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
