"""What a recipe will take, before anything is trained: params, images, steps, multiplications, memory, disk, time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from archsearch.cost.counter import CostItem, count_network, module_cost
from archsearch.cost.meta_device import on_meta_device
from archsearch.training.compatibility import ResolvedShapes, check_recipe, trained_params
from archsearch.training.recipe import BEFORE, Recipe
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders.training import build_tiny_decoder
from snapgen.diffusion import rectified_flow
from snapgen.models.unet import Layer, UNet
from snapgen.objectives.teacher import Teacher
from snapgen.training.stages import (
    AdversarialDistillationStage,
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    NetStage,
    ProgressiveDistillationStage,
    Stage,
)

BACKWARD = 2
"""A backward pass in forward passes, by multiplications; to the inputs alone it is half of that."""
FLOAT, HALF = 4, 2
"""Bytes of a number."""
PROBE_MACS = 2e11
"""Multiplications of a timed pass, unless one image's are more."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, in numbers."""

    name: str
    does: str
    net_params: int
    """Of the net, which is what the stage leaves."""
    params: int
    """Trained: the net's, a projector's, a discriminator's heads'."""
    teacher_params: int
    """Frozen."""
    images: int
    steps: int
    batch: int
    epochs: float | None
    """None: nobody knows how many images there are."""
    macs: int
    """Of all images of the stage: passes forward and backward, the teacher's too."""
    memory: int
    """Bytes, in a process: trained weights, gradients, moments and average, and the teacher's weights."""
    image_memory: int
    """Bytes for each image that a process takes at a time: what the operations write until the gradient is taken."""
    at_a_time: int
    """Images that one process takes at a time, if there is one process."""


@dataclass(frozen=True)
class Plan:
    """A whole recipe in numbers."""

    stages: list[StagePlan]
    examples: int | None
    """Training images."""
    disk: dict[str, int]
    """Bytes of the caches of the training images, by what they hold."""
    macs_per_second: float | None
    """Of a pass of the student here, forward and backward, in float32."""

    @property
    def images(self) -> int:
        """Seen, all stages together."""
        return sum(stage.images for stage in self.stages)

    @property
    def steps(self) -> int:
        """All stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def macs(self) -> int:
        """All stages together."""
        return sum(stage.macs for stage in self.stages)

    def seconds(self, macs: int) -> float:
        """So many multiplications here, predicted; NaN if no pass was timed."""
        return math.nan if self.macs_per_second is None else macs / self.macs_per_second


def plan(
    recipe: Recipe,
    arch: Architecture,
    shapes: ResolvedShapes,
    *,
    examples: int | None,
    captions: int | None,
    timed: bool,
) -> Plan:
    """Every stage in numbers.

    Args:
        shapes: of what the recipe names.
        examples: training images there are, if that is known.
        captions: of these that differ.
        timed: whether to time passes of the student here, from which the time is predicted.

    Raises:
        InputError: as `check_recipe`.
    """
    check_recipe(recipe, arch, shapes)
    planner = _Planner(recipe, arch, shapes, examples)
    stages = [planner.stage(stage) for stage in recipe.stages]
    rate = _macs_per_second(recipe, arch, shapes) if timed else None
    return Plan(stages, examples, _disk(recipe, shapes, examples, captions), rate)


@dataclass(frozen=True)
class _Pass:
    """What one image's way through a net comes to."""

    cost: CostItem
    kept: int
    """Bytes that layers hand on, in fp16: what is left until the gradient with gradient checkpointing."""
    largest: int
    """Bytes that the largest layer writes, in fp16: they are there again while its gradient is taken."""

    def for_gradient(self, number: int, *, checkpointing: bool) -> int:
        """Bytes until the gradient is taken, in numbers of so many bytes."""
        return number * (self.kept + self.largest if checkpointing else self.cost.written_bytes) // HALF


class _Planner:
    def __init__(self, recipe: Recipe, arch: Architecture, shapes: ResolvedShapes, examples: int | None) -> None:
        self.recipe, self.arch, self.shapes, self.examples = recipe, arch, shapes, examples
        self._half = recipe.teacher is not None and recipe.teacher.bfloat16
        self._passes: dict[tuple[str, int], _Pass] = {}

    def stage(self, stage: AnyStage) -> StagePlan:
        return self._decoder(stage) if isinstance(stage, DecoderStage) else self._net(stage)

    def _net(self, stage: NetStage) -> StagePlan:
        teacher: Teacher | UNet | None = self.shapes.unet(stage, self.arch) or self.shapes.teacher(stage)
        size = stage.resolution // self.shapes.factor
        trains_teacher = isinstance(stage, FlowMatchingStage) and stage.net == "teacher"
        trained = self._pass(teacher if trains_teacher else None, size)
        params = trained_params(self.recipe, self.arch, stage, teacher)
        macs = round(_student_passes(stage) * (1 + BACKWARD + stage.gradient_checkpointing) * trained.cost.macs)
        number = HALF if stage.precision == "bfloat16" else FLOAT
        image_memory = trained.for_gradient(number, checkpointing=stage.gradient_checkpointing)
        memory, teacher_params = FLOAT * (4 * params + bool(stage.ema) * trained.cost.params), 0
        if teacher is not None and not trains_teacher:
            half = self._half and isinstance(teacher, Teacher)
            lesson, number = self._pass(teacher, size), HALF if half else FLOAT
            teacher_params = lesson.cost.params
            memory += number * teacher_params
            macs += round(_teacher_passes(stage) * lesson.cost.macs)
            judges = isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None
            seen = lesson.for_gradient(number, checkpointing=stage.gradient_checkpointing) if judges else 0
            image_memory += max(seen, number * lesson.cost.activation_bytes // HALF)
        images = stage.steps * stage.batch
        return StagePlan(
            name=stage.name,
            does=_does(stage),
            net_params=trained.cost.params,
            params=params,
            teacher_params=teacher_params,
            images=images,
            steps=stage.steps,
            batch=stage.batch,
            epochs=None if self.examples is None else images / self.examples,
            macs=macs * images,
            memory=memory,
            image_memory=image_memory,
            at_a_time=stage.batch // stage.accumulate,
        )

    def _decoder(self, stage: DecoderStage) -> StagePlan:
        training, shapes = stage.training, self.shapes
        decoder = build_tiny_decoder(shapes, seed=0, **stage.decoder).to("meta")
        lowest = min(training.resolutions)  # at higher ones a step takes fewer images and costs as much
        side = lowest // shapes.factor
        latents = torch.empty(1, shapes.latent_channels, side, side, device="meta")
        cost = count_network(decoder, latents, places={}).parts[None]
        images = training.steps * training.batch
        return StagePlan(
            name=stage.name,
            does="tiny decoder",
            net_params=cost.params,
            params=cost.params,
            teacher_params=0,
            images=images,
            steps=training.steps,
            batch=training.batch,
            epochs=None if self.examples is None else images / min(self.examples, stage.held),
            macs=(1 + BACKWARD) * cost.macs * images,
            memory=5 * FLOAT * cost.params,
            image_memory=FLOAT * cost.written_bytes // HALF,
            at_a_time=training.batch,
        )

    def _pass(self, teacher: Teacher | UNet | None, size: int) -> _Pass:
        """Of one image through a teacher, or through the student; nets of one shape are passed once."""
        net = teacher if isinstance(teacher, Teacher) else self.arch if teacher is None else teacher.arch
        key = net.id if isinstance(net, Architecture) else str(sorted(net.net.config.items(), key=str)), size
        if key not in self._passes:
            self._passes[key] = self._passed(net, size)
        return self._passes[key]

    def _passed(self, teacher: Teacher | Architecture, size: int) -> _Pass:
        if isinstance(teacher, Architecture):
            net, *inputs = on_meta_device(teacher, size, self.shapes.context.tokens)
            return _passed(net, Layer, *inputs)
        widths = self.shapes.teacher_context
        with torch.device("meta"):
            sample = torch.empty(1, teacher.latent_channels, size, size)
            context = torch.empty(1, widths.tokens, widths.context)
            return _passed(
                teacher, JointTransformerBlock, sample, torch.empty(1), context, torch.empty(1, widths.pooled)
            )


def _passed(net: nn.Module, layer: type[nn.Module], *inputs: Tensor) -> _Pass:
    layers = [module for module in net.modules() if isinstance(module, layer)]
    kept = 0

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal kept
        kept += sum(HALF * t.numel() for t in (output if isinstance(output, tuple) else (output,)) if t is not None)

    handles = [module.register_forward_hook(keep) for module in layers]
    parts = count_network(net, *inputs, places={module: place for place, module in enumerate(layers)}).parts
    for handle in handles:
        handle.remove()
    total = CostItem(
        params=sum(part.params for part in parts.values()),
        macs=sum(part.macs for part in parts.values()),
        activation_bytes=max(part.activation_bytes for part in parts.values()),
        written_bytes=sum(part.written_bytes for part in parts.values()),
    )
    return _Pass(total, kept, max((p.written_bytes for place, p in parts.items() if place is not None), default=0))


def _student_passes(stage: NetStage) -> float:
    """Passes of the net that is trained, forward and back, for each image: two where it is guided."""
    return 1 + stage.probability if isinstance(stage, ProgressiveDistillationStage) else 1


def _teacher_passes(stage: NetStage) -> float:
    """Forward passes of the teacher for each image.

    Distilled: one, two with guidance. Judged: one of the student's image and one back to it, then one of each kind.
    Halving: two steps, each twice with guidance.
    """
    if isinstance(stage, ProgressiveDistillationStage):
        return 2 * (1 + stage.probability)
    distilled = 0 if stage.distillation is None else 1 if stage.distillation.guidance == 1 else 2
    judged = 4 if isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None else 0
    return distilled + judged


def _disk(recipe: Recipe, shapes: ResolvedShapes, examples: int | None, captions: int | None) -> dict[str, int]:
    """Bytes that the latents and the text embeddings of the training images take, each computed once."""
    if examples is None:
        return {}
    nets = [stage for stage in recipe.stages if isinstance(stage, Stage)]
    found = {
        f"latents at {side} px": examples * HALF * shapes.latent_channels * (side // shapes.factor) ** 2
        for side in sorted({stage.resolution for stage in nets})
    }
    if nets:
        different = {(e.encoder, e.tokens, e.layer) for e in (*recipe.text, *recipe.teacher_text)}
        numbers = [(tokens, *shapes.encoders[encoder]) for encoder, tokens, _ in different]
        each = sum(HALF * (tokens * width + pooled) for tokens, width, pooled in numbers)
        found["text embeddings"] = each * (examples if captions is None else captions)
    return found


def _macs_per_second(recipe: Recipe, arch: Architecture, shapes: ResolvedShapes) -> float | None:
    """Of a pass of the student forward and backward, here: the median of three, or only one."""
    first = next((stage for stage in recipe.stages if isinstance(stage, Stage)), None)
    if first is None:
        return None
    size = first.resolution // shapes.factor
    macs = (1 + BACKWARD) * module_cost(*on_meta_device(arch, size, shapes.context.tokens)).macs
    images = max(1, min(first.batch // first.accumulate, int(PROBE_MACS // macs)))
    net = UNet(arch)
    data, noise = torch.randn(2, images, arch.latent_channels, size, size)
    context = torch.randn(images, shapes.context.tokens, arch.context_width)
    times = []
    for _ in range(1 if macs > PROBE_MACS / 4 else 4):  # one is rough, but of a large net it takes long enough
        began = time.perf_counter()
        torch.autograd.backward(rectified_flow.losses(net, data, noise, torch.rand(images), context).mean())
        times.append(time.perf_counter() - began)
    return float(images * macs / statistics.median(times[1:] or times))


def _does(stage: NetStage) -> str:
    if isinstance(stage, ProgressiveDistillationStage):
        by = "" if stage.teacher == BEFORE else f", taught by {stage.teacher}"
        return f"from {stage.teacher_steps} to {stage.student_steps} steps{by}"
    taught = [name for name in ("output", "features") if stage.distillation and getattr(stage.distillation, name)]
    distils = f"distils {' and '.join(taught)}" if taught else ""
    if isinstance(stage, AdversarialDistillationStage):
        judged = "against a critic" if stage.adversarial else ""
        return ", ".join(filter(None, (f"to {stage.student_steps} steps", judged, distils)))
    return "trains the teacher" if stage.net == "teacher" else ", ".join(filter(None, ("flow matching", distils)))
