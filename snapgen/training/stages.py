"""What a training is made of: stages, each with its data's size, its optimizer, its losses."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from snapgen.autoencoders.training import DecoderTrainingConfig
from snapgen.config import Config
from snapgen.optim.config import OptimizerConfig

SHIFT_AT_1024 = 3.0
"""SD3's shift of the timesteps for 1024 px (arXiv 2403.03206, section 5.3.2)."""


class DistillationConfig(Config):
    """What the student learns from a teacher (SnapGen, section 3.3)."""

    output: bool = True
    """The teacher's velocity."""
    features: bool = True
    """The teacher's last features, through a projector."""
    scaling: Literal["timestep", "none"] = "timestep"
    """timestep: SnapGen's S(task, teacher); none: losses are added up with the weights below."""
    output_weight: float = Field(default=1, ge=0)
    feature_weight: float = Field(default=1, ge=0)
    """Both for scaling none; our choice."""
    guidance: float = Field(default=1, ge=0, le=100)
    """Of the teacher's velocity; 1: none."""

    @model_validator(mode="after")
    def _teaches_something(self) -> Self:
        if not (self.output or self.features):
            raise ValueError("output and features are both off; turn one on, or remove distillation")
        return self


class AdversarialConfig(Config):
    """The discriminator of step distillation (LADD, arXiv 2403.12015); its own values are our choice."""

    weight: float = Field(default=1, ge=0)
    """Of the student's adversarial loss, beside the others'."""
    r1: float = Field(default=0.1, ge=0)
    """Of the penalty on the heads' gradient at real images' tokens."""
    learning_rate: float = Field(default=1e-3, gt=0)
    blocks: tuple[int, ...] | None = Field(default=None, min_length=1)
    """The teacher's blocks whose tokens are judged; None: four, evenly spread, the last among them."""
    noise: tuple[float, float] = (1, 1)
    """Mean and standard deviation of the logit-normal timesteps at which images are judged (LADD, section 3)."""

    @field_validator("noise")
    @classmethod
    def _spreads(cls, noise: tuple[float, float]) -> tuple[float, float]:
        if noise[1] <= 0:
            raise ValueError("the standard deviation must be above 0; LADD's are 1, 1")
        return noise


class _Named(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")
    """Of the stage's folder, and in the logs."""


class Stage(_Named, OptimizerConfig):
    """What stages of a net on latents share."""

    resolution: int = Field(ge=8, le=4096)
    """Of the images, in pixels."""
    images: int = Field(ge=1)
    """Images seen, with repetitions."""
    accumulate: int = Field(default=1, ge=1)
    """Parts of a process's share of the batch, one after another, whose gradients are added up."""
    shift: float | Literal["resolution"] = 1
    """Of the timesteps towards noise. resolution: SD3's 3 at 1024 px, 1 at 256 px, between them its power."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Images between evaluations; None: one at the end."""
    teacher: str | None = None
    """Folder of a teacher for this stage alone, of the same text encoders; None: the recipe's."""
    on_bad: Literal["skip", "halt"] = "halt"
    """When a gradient is not finite, its step is not taken; then go on, or stop."""
    compile: bool = False
    """torch.compile, on CUDA."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}; use a divisor")
        if self.shift != "resolution" and not self.shift > 0:
            raise ValueError(f"shift can not be {self.shift}; use a number above 0, or 'resolution'")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.images / self.batch)

    @property
    def timestep_shift(self) -> float:
        """`shift` as a number; between 256 and 1024 px our choice is the power law through SD3's two points."""
        if self.shift == "resolution":
            return float(SHIFT_AT_1024 ** (math.log(self.resolution / 256) / math.log(4)))
        return self.shift


class FlowMatchingStage(Stage):
    """Flow-matching training, alone or beside a teacher."""

    kind: Literal["flow"] = "flow"
    net: Literal["student", "teacher"] = "student"
    distillation: DistillationConfig | None = None
    block_dropout: float = Field(default=0, ge=0, lt=1)
    """Robust training: how often each block is left out for a step (arXiv 2306.00980, section 3.1, which says no
    number), so that sub-networks can be told apart by what they lose (`snapgen.models.subnetworks`)."""

    @model_validator(mode="after")
    def _teaches_the_student(self) -> Self:
        if self.net == "teacher" and self.distillation is not None:
            raise ValueError("a teacher has no teacher; remove distillation, or train the student")
        if self.net == "teacher" and self.block_dropout:
            raise ValueError("a teacher's blocks always run; remove block_dropout, or train the student")
        if self.block_dropout and self.compile:
            raise ValueError("block_dropout makes another net of every step; turn compile off")
        return self


class AdversarialDistillationStage(Stage):
    """Distillation to a few steps, by a discriminator on the teacher's tokens and by the teacher's velocity."""

    kind: Literal["steps"] = "steps"
    student_steps: int = Field(default=4, ge=1, le=64)
    """Of the sampler that the student is made for."""
    adversarial: AdversarialConfig | None = AdversarialConfig()
    """None: no discriminator."""
    distillation: DistillationConfig | None = DistillationConfig(features=False)


class ProgressiveDistillationStage(Stage):
    """Distillation of two DDIM steps into one (SnapFusion, arXiv 2306.00980, section 4); see
    `snapgen.objectives.progressive`."""

    kind: Literal["halving"] = "halving"
    teacher: str = "before"
    """Folder of a U-Net that predicts what the student does, under the same text encoders; before: the student itself,
    as it stands where the stage begins."""
    teacher_steps: int = Field(default=32, ge=2, le=1000)
    """Of the sampler that the teacher is made for; the student's are half as many."""
    probability: float = Field(default=0.1, ge=0, le=1)
    """Of a step being CFG-aware; 0: vanilla."""
    guidance: tuple[float, float] = (2, 14)
    """Smallest and largest w of the CFG-aware steps."""
    original: float = Field(default=0.2, ge=0)
    """γ, of the loss without a teacher, once that is scaled to the distillation's."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.teacher_steps % 2:
            problem = f"teacher_steps {self.teacher_steps} is odd; two of them become one, so use an even number"
            raise ValueError(problem)
        low, high = self.guidance
        if not 0 <= low <= high:
            raise ValueError(f"guidance is from {low:g} to {high:g}; the paper's is [2, 14]")
        return self

    @property
    def student_steps(self) -> int:
        """Of the sampler that the student is made for."""
        return self.teacher_steps // 2


class DecoderStage(_Named):
    """Training of a tiny decoder for the autoencoder's frozen encoder (SnapGen, section 3.2)."""

    kind: Literal["decoder"] = "decoder"
    training: DecoderTrainingConfig = DecoderTrainingConfig()
    decoder: dict[str, Any] = Field(default_factory=dict)
    """Of `snapgen.autoencoders.tiny_decoder.TinyDecoder`, beside latent_channels; empty: the paper's."""
    held: int = Field(default=20_000, ge=2)
    """Images that are held in memory, decoded, to be drawn from: the first ones, a fair sample of the set."""


NetStage = FlowMatchingStage | AdversarialDistillationStage | ProgressiveDistillationStage
"""A stage of a net on latents."""
AnyStage = Annotated[
    FlowMatchingStage | AdversarialDistillationStage | ProgressiveDistillationStage | DecoderStage,
    Field(discriminator="kind"),
]
