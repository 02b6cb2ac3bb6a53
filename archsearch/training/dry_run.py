"""Plan of a recipe before anything is trained: parameters, images, steps, MACs, memory, disk space and time."""

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
from archsearch.library.machines import Precision
from archsearch.training.compatibility import ResolvedShapes, check_recipe, trained_params
from archsearch.training.recipe import BEFORE, Recipe
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders.training import build_tiny_decoder
from snapgen.diffusion.process import RectifiedFlow
from snapgen.models.unet import Layer, UNet, check_memory
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

BACKWARD_PASSES = 2
"""MACs of a backward pass relative to a forward pass; a backward pass to the inputs alone takes half of that."""
FLOAT32_BYTES, FLOAT16_BYTES = 4, 2
PROBE_MACS = 2e11
"""MACs of a timed pass, unless a single image needs more."""


@dataclass(frozen=True)
class StagePlan:
    """Plan of one stage."""

    name: str
    description: str
    net_params: int
    """Parameters of the net that the stage produces."""
    params: int
    """Trained parameters: those of the net, the feature projector and the discriminator heads."""
    teacher_params: int
    """Parameters of the frozen teacher."""
    images: int
    steps: int
    batch: int
    epochs: float | None
    """None if the number of training images is unknown."""
    macs: int
    """MACs of the whole stage: forward and backward passes, including the teacher's."""
    memory: int
    """Bytes in each process: trained weights, gradients, moments and EMA, and the teacher's weights."""
    image_memory: int
    """Bytes for each image of a micro-batch: what the operations write until the gradient is computed."""
    micro_batch_size: int
    """Images in one forward pass, with a single process."""
    precision: Precision
    """Type of the activations."""
    single_process: bool
    """Whether one process trains it, whatever their number."""


@dataclass(frozen=True)
class Plan:
    """Plan of a whole recipe."""

    stages: list[StagePlan]
    examples: int | None
    """Number of training images; None if unknown."""
    disk: dict[str, int]
    """Bytes of each cache of the training images."""
    macs_per_second: float | None
    """Measured speed on this machine: MACs per second of a forward and backward pass of the student in float32."""

    @property
    def images(self) -> int:
        """Images seen in all stages together."""
        return sum(stage.images for stage in self.stages)

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def macs(self) -> int:
        """MACs of all stages together."""
        return sum(stage.macs for stage in self.stages)

    def seconds(self, macs: int) -> float:
        """Predicted time of ``macs`` MACs on this machine; NaN if no pass was timed."""
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
    """Plan every stage of a recipe.

    Args:
        recipe: the recipe.
        arch: architecture of the student.
        shapes: shapes of everything that the recipe names.
        examples: number of training images; None if unknown.
        captions: number of distinct captions; None: every image has its own.
        timed: whether to time passes of the student on this machine, to predict durations.

    Raises:
        InputError: if the recipe's models do not fit together (`check_recipe`).
    """
    check_recipe(recipe, arch, shapes)
    planner = _Planner(recipe, arch, shapes, examples)
    stages = [planner.stage(stage) for stage in recipe.stages]
    macs_per_second = _macs_per_second(recipe, arch, shapes) if timed else None
    return Plan(stages, examples, _disk(recipe, shapes, examples, captions), macs_per_second)


@dataclass(frozen=True)
class _PassCost:
    """Cost of one forward pass of one image."""

    cost: CostItem
    layer_outputs: int
    """Bytes of the outputs of all layers in fp16, which gradient checkpointing keeps until the gradient."""
    largest: int
    """Bytes that the largest layer writes in fp16, which are recomputed for its gradient."""

    def bytes_for_gradient(self, element_size: int, *, checkpointing: bool) -> int:
        """Bytes that are kept until the gradient is computed, with elements of ``element_size`` bytes."""
        return (
            element_size
            * (self.layer_outputs + self.largest if checkpointing else self.cost.written_bytes)
            // FLOAT16_BYTES
        )


class _Planner:
    def __init__(self, recipe: Recipe, arch: Architecture, shapes: ResolvedShapes, examples: int | None) -> None:
        self.recipe, self.arch, self.shapes, self.examples = recipe, arch, shapes, examples
        self._bfloat16_teacher = recipe.teacher is not None and recipe.teacher.bfloat16
        self._passes: dict[tuple[str, int], _PassCost] = {}

    def stage(self, stage: AnyStage) -> StagePlan:
        return self._decoder(stage) if isinstance(stage, DecoderStage) else self._net(stage)

    def _net(self, stage: NetStage) -> StagePlan:
        teacher: Teacher | UNet | None = self.shapes.unet(stage, self.arch) or self.shapes.teacher(stage)
        size = stage.resolution // self.shapes.factor
        trains_teacher = isinstance(stage, FlowMatchingStage) and stage.net == "teacher"
        trained = self._pass(teacher if trains_teacher else None, size)
        params = trained_params(self.recipe, self.arch, stage, teacher)
        # Two passes for a guided image, which is cond and uncond.
        passes = 1 + stage.cfg_probability if isinstance(stage, ProgressiveDistillationStage) else 1
        macs = round(passes * (1 + BACKWARD_PASSES + stage.gradient_checkpointing) * trained.cost.macs)
        element_size = FLOAT16_BYTES if stage.precision == "bfloat16" else FLOAT32_BYTES
        image_memory = trained.bytes_for_gradient(element_size, checkpointing=stage.gradient_checkpointing)
        # weights, gradients and two moments of each trained parameter, and the EMA
        memory, teacher_params = FLOAT32_BYTES * (4 * params + bool(stage.ema_sigma_rel) * trained.cost.params), 0
        if teacher is not None and not trains_teacher:
            in_bfloat16 = self._bfloat16_teacher and isinstance(teacher, Teacher)
            element_size = FLOAT16_BYTES if in_bfloat16 else FLOAT32_BYTES
            teacher_pass = self._pass(teacher, size)
            teacher_params = teacher_pass.cost.params
            memory += element_size * teacher_params
            macs += round(_teacher_passes(stage) * teacher_pass.cost.macs)
            is_adversarial = isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None
            # The discriminator's gradient runs through the teacher.
            checkpointing = stage.gradient_checkpointing
            for_gradient = teacher_pass.bytes_for_gradient(element_size, checkpointing=checkpointing)
            image_memory += max(
                for_gradient if is_adversarial else 0,
                element_size * teacher_pass.cost.activation_bytes // FLOAT16_BYTES,
            )
        images = stage.steps * stage.batch_size
        return StagePlan(
            name=stage.name,
            description=_describe(stage),
            net_params=trained.cost.params,
            params=params,
            teacher_params=teacher_params,
            images=images,
            steps=stage.steps,
            batch=stage.batch_size,
            epochs=None if self.examples is None else images / self.examples,
            macs=macs * images,
            memory=memory,
            image_memory=image_memory,
            micro_batch_size=stage.batch_size // stage.gradient_accumulation_steps,
            precision=stage.precision,
            single_process=False,
        )

    def _decoder(self, stage: DecoderStage) -> StagePlan:
        training, shapes = stage.training, self.shapes
        decoder = build_tiny_decoder(shapes, seed=0, **stage.decoder).to("meta")
        resolution = min(training.resolutions)  # at higher ones a step has fewer images and the same cost
        size = resolution // shapes.factor
        latents = torch.empty(1, shapes.latent_channels, size, size, device="meta")
        cost = count_network(decoder, latents, groups={}).by_group[None]
        images = training.steps * training.batch_size
        return StagePlan(
            name=stage.name,
            description="tiny decoder",
            net_params=cost.params,
            params=cost.params,
            teacher_params=0,
            images=images,
            steps=training.steps,
            batch=training.batch_size,
            epochs=None if self.examples is None else images / min(self.examples, stage.max_images),
            macs=(1 + BACKWARD_PASSES) * cost.macs * images,
            memory=5 * FLOAT32_BYTES * cost.params,
            image_memory=FLOAT32_BYTES * cost.written_bytes // FLOAT16_BYTES,
            micro_batch_size=training.batch_size,
            precision="float32",
            single_process=True,
        )

    def _pass(self, teacher: Teacher | UNet | None, size: int) -> _PassCost:
        """Cost of a pass through a teacher, or through the student if None; cached by the shape of the net."""
        net = teacher if isinstance(teacher, Teacher) else self.arch if teacher is None else teacher.arch
        key = net.id if isinstance(net, Architecture) else str(sorted(net.net.config.items(), key=str)), size
        if key not in self._passes:
            self._passes[key] = self._count(net, size)
        return self._passes[key]

    def _count(self, teacher: Teacher | Architecture, size: int) -> _PassCost:
        if isinstance(teacher, Architecture):
            net, *inputs = on_meta_device(teacher, size, self.shapes.context.tokens)
            return _count_pass(net, Layer, *inputs)
        dims = self.shapes.teacher_context
        with torch.device("meta"):
            sample = torch.empty(1, teacher.latent_channels, size, size)
            context = torch.empty(1, dims.tokens, dims.context)
            return _count_pass(
                teacher, JointTransformerBlock, sample, torch.empty(1), context, torch.empty(1, dims.pooled)
            )


def _count_pass(net: nn.Module, layer: type[nn.Module], *inputs: Tensor) -> _PassCost:
    """Cost of a pass of a net on the meta device, whose gradient checkpoints are at modules of type ``layer``."""
    layers = [module for module in net.modules() if isinstance(module, layer)]
    layer_outputs = 0

    def add_output(_module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal layer_outputs
        layer_outputs += sum(
            FLOAT16_BYTES * t.numel() for t in (output if isinstance(output, tuple) else (output,)) if t is not None
        )

    handles = [module.register_forward_hook(add_output) for module in layers]
    counts = count_network(net, *inputs, groups={module: index for index, module in enumerate(layers)}).by_group
    for handle in handles:
        handle.remove()
    largest = max((item.written_bytes for index, item in counts.items() if index is not None), default=0)
    return _PassCost(CostItem.total(counts.values()), layer_outputs, largest)


def _teacher_passes(stage: NetStage) -> float:
    """Forward passes of the teacher for each image.

    Output or feature distillation: one, two with guidance. Adversarial: one forward pass of the student's image and one
    backward pass to it for the student, then one pass each of a real and a generated image for the discriminator.
    Progressive distillation: two steps, two passes each with guidance.
    """
    if isinstance(stage, ProgressiveDistillationStage):
        return 2 * (1 + stage.cfg_probability)
    distilled = 0 if stage.distillation is None else 1 if stage.distillation.guidance_scale == 1 else 2
    adversarial = 4 if isinstance(stage, AdversarialDistillationStage) and stage.adversarial is not None else 0
    return distilled + adversarial


def _disk(recipe: Recipe, shapes: ResolvedShapes, examples: int | None, captions: int | None) -> dict[str, int]:
    """Bytes of the cached latents and text embeddings of the training images, in fp16."""
    if examples is None:
        return {}
    nets = [stage for stage in recipe.stages if isinstance(stage, Stage)]
    sizes = {
        f"latents at {resolution} px": examples
        * FLOAT16_BYTES
        * shapes.latent_channels
        * (resolution // shapes.factor) ** 2
        for resolution in sorted({stage.resolution for stage in nets})
    }
    if nets:
        distinct = {(e.encoder, e.tokens, e.layer) for e in (*recipe.text_encoders, *recipe.teacher_text_encoders)}
        dims = [(tokens, *shapes.encoders[encoder]) for encoder, tokens, _ in distinct]
        per_caption = sum(FLOAT16_BYTES * (tokens * width + pooled) for tokens, width, pooled in dims)
        sizes["text embeddings"] = per_caption * (examples if captions is None else captions)
    return sizes


def _macs_per_second(recipe: Recipe, arch: Architecture, shapes: ResolvedShapes) -> float | None:
    """Measured MACs per second of a forward and backward pass of the student: the median of three, or a single one.

    None if the recipe trains no net.
    """
    first = next((stage for stage in recipe.stages if isinstance(stage, Stage)), None)
    if first is None:
        return None
    size = first.resolution // shapes.factor
    macs = (1 + BACKWARD_PASSES) * module_cost(*on_meta_device(arch, size, shapes.context.tokens)).macs
    images = max(1, min(first.batch_size // first.gradient_accumulation_steps, int(PROBE_MACS // macs)))
    check_memory(arch, copies=2, source=recipe.source)
    net = UNet(arch)
    data, noise = torch.randn(2, images, arch.latent_channels, size, size)
    context = torch.randn(images, shapes.context.tokens, arch.context_dim)
    times = []
    # A single pass of a large net takes long enough; else one warm-up and three passes.
    for _ in range(1 if macs > PROBE_MACS / 4 else 4):
        start = time.perf_counter()
        torch.autograd.backward(RectifiedFlow().losses(net, data, noise, torch.rand(images), context).mean())
        times.append(time.perf_counter() - start)
    return float(images * macs / statistics.median(times[1:] or times))


def _describe(stage: NetStage) -> str:
    """Kind of training of a stage, in words."""
    if isinstance(stage, ProgressiveDistillationStage):
        teacher = "" if stage.teacher == BEFORE else f", taught by {stage.teacher}"
        return f"from {stage.teacher_steps} to {stage.student_steps} steps{teacher}"
    distilled = [name for name in ("output", "features") if stage.distillation and getattr(stage.distillation, name)]
    distillation = f"distills {' and '.join(distilled)}" if distilled else ""
    if isinstance(stage, AdversarialDistillationStage):
        adversary = "against a discriminator" if stage.adversarial else ""
        steps = "to one step" if stage.student_steps == 1 else f"to {stage.student_steps} steps"
        return ", ".join(filter(None, (steps, adversary, distillation)))
    return "trains the teacher" if stage.net == "teacher" else ", ".join(filter(None, ("flow matching", distillation)))
