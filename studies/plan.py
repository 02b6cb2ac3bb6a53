"""What a recipe will take, before anything is trained: params, images, steps, memory, time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from archsearch.cost import module_cost
from archsearch.meta import unbuilt
from snapgen import flow
from snapgen.arch import Architecture
from snapgen.decoder_training import tiny_decoder_for
from snapgen.distillation import Projector
from snapgen.stages import AnyStage, DecoderStage, FlowStage, Stage, StepStage
from snapgen.teacher import Teacher
from snapgen.unet import UNet
from studies.recipe import Recipe, learns_from_teacher
from studies.shapes import Shapes, check

BACKWARD = 2
"""A backward pass in forward passes, by multiplications."""
FLOAT = 4
"""Bytes of a weight, a gradient, a moment."""
PROBE_MACS = 2e11
"""Multiplications of a probe, at most: a few seconds on a CPU core."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, in numbers."""

    name: str
    does: str
    params: int
    """Trained, all turns together."""
    teacher_params: int
    images: int
    steps: int
    batch: int
    epochs: float | None
    """None: the data were not there to be counted."""
    macs: int
    """Of all images of the stage: passes forward and backward, the teacher's too."""
    memory: int
    """Bytes: weights, gradients, moments and averages, the teacher, and one part's activations; predicted."""
    seconds: float | None
    """On this machine, predicted; None: not asked for."""


def plan(recipe: Recipe, arch: Architecture, shapes: Shapes, *, examples: int | None, timed: bool) -> list[StagePlan]:
    """Every stage in numbers.

    Args:
        shapes: of what the recipe names.
        examples: training images there are, if they could be counted.
        timed: whether to time a pass of the student here, from which the time is predicted.

    Raises:
        InputError: as `check`.
    """
    check(recipe, arch, shapes)
    rate = _macs_per_second(recipe, arch, shapes) if timed else None
    return [_stage_plan(recipe, arch, shapes, stage, examples, rate) for stage in recipe.stages]


def _stage_plan(
    recipe: Recipe, arch: Architecture, shapes: Shapes, stage: AnyStage, examples: int | None, rate: float | None
) -> StagePlan:
    if isinstance(stage, DecoderStage):
        return _decoder_plan(shapes, stage, examples, rate)
    size = stage.resolution // shapes.factor
    is_teacher = isinstance(stage, FlowStage) and stage.net == "teacher"
    student = _cost(shapes, None, arch, size)
    teaches = shapes.teacher if is_teacher or learns_from_teacher(stage) else None
    lesson = None if teaches is None else _cost(shapes, teaches, arch, size)
    trained = lesson if is_teacher and lesson is not None else student
    params, macs = trained.params, (1 + BACKWARD) * trained.macs
    teacher_params = 0
    if lesson is not None and not is_teacher:
        teacher_params = lesson.params
        macs += lesson.macs * _passes(stage)
        if stage.distillation is not None and stage.distillation.features and teaches is not None:
            params += _projector(arch, teaches)
    part = stage.batch // stage.accumulate
    precision = 2 if stage.precision == "bfloat16" else FLOAT
    average = bool(stage.ema) * trained.params
    memory = FLOAT * (4 * params + average) + teacher_params * (
        2 if recipe.teacher is not None and recipe.teacher.bfloat16 else FLOAT
    )
    memory += trained.activation_bytes * part * precision // FLOAT
    total = macs * stage.steps * stage.batch
    return StagePlan(
        name=stage.name,
        does=_does(stage),
        params=params,
        teacher_params=teacher_params,
        images=stage.steps * stage.batch,
        steps=stage.steps,
        batch=stage.batch,
        epochs=None if examples is None else stage.steps * stage.batch / examples,
        macs=total,
        memory=memory,
        seconds=None if rate is None else total / rate,
    )


def _passes(stage: FlowStage | StepStage) -> int:
    """Forward passes of the teacher for each image; one back to its input counts as one."""
    distilled = 0 if stage.distillation is None else 1 if stage.distillation.guidance == 1 else 2
    judged = 4 if isinstance(stage, StepStage) and stage.adversarial is not None else 0
    return distilled + judged


def _decoder_plan(shapes: Shapes, stage: DecoderStage, examples: int | None, rate: float | None) -> StagePlan:
    training = stage.training
    decoder = tiny_decoder_for(shapes, seed=0, **stage.decoder).to("meta")
    lowest = min(training.resolutions)
    side = lowest // shapes.factor
    cost = module_cost(decoder, torch.empty(1, shapes.latent_channels, side, side, device="meta"))
    images = training.steps * training.batch
    macs = images * (1 + BACKWARD) * cost.macs
    return StagePlan(
        name=stage.name,
        does="tiny decoder",
        params=cost.params,
        teacher_params=0,
        images=images,
        steps=training.steps,
        batch=training.batch,
        epochs=None if examples is None else images / min(examples, stage.held),
        macs=macs,
        memory=5 * FLOAT * cost.params + cost.activation_bytes * training.batch,
        seconds=None if rate is None else macs / rate,
    )


def _cost(shapes: Shapes, teaches: Teacher | None, arch: Architecture, size: int) -> Any:
    """Of one image through the teacher, or through the student, on the meta device."""
    if teaches is None:
        return module_cost(*unbuilt(arch, size, shapes.context.tokens))
    widths = shapes.teacher_context
    sample, t = torch.empty(1, arch.latent_channels, size, size, device="meta"), torch.empty(1, device="meta")
    context = torch.empty(1, widths.tokens, widths.context, device="meta")
    return module_cost(teaches, sample, t, context, torch.empty(1, widths.pooled, device="meta"))


def _projector(arch: Architecture, teaches: Teacher) -> int:
    with torch.device("meta"):
        projector = Projector(arch.up[0].channels, teaches.width, teaches.patch)
    return sum(weight.numel() for weight in projector.parameters())


def _macs_per_second(recipe: Recipe, arch: Architecture, shapes: Shapes) -> float:
    """Of a pass of the student forward and backward, here: the median of three, after one to warm up."""
    first = next((stage for stage in recipe.stages if isinstance(stage, Stage)), None)
    if first is None:
        return math.nan
    size = first.resolution // shapes.factor
    macs = (1 + BACKWARD) * _cost(shapes, None, arch, size).macs
    images = max(1, min(first.batch // first.accumulate, int(PROBE_MACS // macs)))
    net, times = UNet(arch), []
    data, noise = torch.randn(2, images, arch.latent_channels, size, size)
    context = torch.randn(images, shapes.context.tokens, arch.context_width)
    for _ in range(4):
        began = time.perf_counter()
        torch.autograd.backward(flow.losses(net, data, noise, torch.rand(images), context).mean())
        times.append(time.perf_counter() - began)
    return float(images * macs / statistics.median(times[1:]))


def _does(stage: FlowStage | StepStage) -> str:
    if isinstance(stage, StepStage):
        return f"distils to {stage.student_steps} steps"
    if stage.net == "teacher":
        return "trains the teacher"
    if stage.distillation is None:
        return "flow matching"
    what = [name for name in ("output", "features") if getattr(stage.distillation, name)]
    return f"flow matching, distils {' and '.join(what)}"
