"""Configuration of training stages: each has a resolution, an optimizer and losses of its own."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from snapgen.autoencoders.training import DecoderTrainingConfig
from snapgen.config import Config, rule
from snapgen.training.settings import DistillationConfig, TrainingConfig

SHIFT_AT_1024 = 3.0
"""Timestep shift of SD3 at 1024 px (arXiv 2403.03206, section 5.3.2)."""


EvaluationMetric = Literal[
    "validation_loss", "frechet_distance", "kernel_distance", "retrieval_r1", "retrieval_r10", "retrieval_mrr"
]
"""Metrics of an evaluation by which a stage may keep its best weights."""
HIGHER_IS_BETTER: tuple[EvaluationMetric, ...] = ("retrieval_r1", "retrieval_r10", "retrieval_mrr")
"""Metrics of which the highest is the best."""


class AdversarialConfig(Config):
    """The discriminator of step distillation (LADD, arXiv 2403.12015). The default values are our choice."""

    weight: float = Field(default=1, ge=0)
    """Weight of the student's adversarial loss, relative to the other losses."""
    r1: float = Field(default=0.1, ge=0)
    """Weight of the R1 penalty: the gradient of the discriminator's heads at the tokens of real images."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the discriminator's heads."""
    blocks: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Teacher blocks whose tokens the discriminator sees; None: four, evenly spaced, including the last."""
    renoise_mean_std: tuple[float, float] = (1, 1)
    """Mean and standard deviation of the logit-normal timesteps at which images are renoised for the discriminator
    (LADD, section 3)."""

    @field_validator("renoise_mean_std")
    @classmethod
    def _check_std(cls, mean_std: tuple[float, float]) -> tuple[float, float]:
        if mean_std[1] <= 0:
            raise ValueError("the standard deviation must be above 0; LADD uses mean 1 and standard deviation 1")
        return mean_std


class _NamedStage(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")
    """Name of the stage, used for its folder and in the logs."""


class Stage(_NamedStage, TrainingConfig):
    """Settings common to all stages that train a net on latents."""

    resolution: int = Field(ge=8, le=4096)
    """Height and width of the images, in pixels."""
    num_images: int = Field(ge=1, le=1_000_000_000_000)
    """Images seen in training, repetitions included."""
    timestep_shift: float | Literal["resolution"] = 1
    """Shift of the timesteps towards noise. resolution: 3 at 1024 px as in SD3, 1 at 256 px, and a power law between
    them."""
    evaluate_every: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Images between evaluations; None: one evaluation at the end."""
    keep_best_by: EvaluationMetric | None = None
    """Metric of the evaluations by which the best weights are kept as the stage's result; None: the last weights are
    kept."""
    teacher: str | None = None
    """Folder of a teacher for this stage alone, with the same text encoders; None: the recipe's teacher."""
    on_nonfinite_grad: Literal["skip", "halt"] = "halt"
    """Action when a gradient is not finite; its step is never taken. skip: continue; halt: stop."""

    @rule
    def _check_shift(self) -> None:
        if self.timestep_shift != "resolution" and not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift cannot be {self.timestep_shift}; use a number above 0, or 'resolution'")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.num_images / self.batch_size)

    @property
    def timestep_shift_value(self) -> float:
        """``timestep_shift`` as a number. ``resolution`` is a power law through 1 at 256 px and SD3's 3 at 1024 px; the
        power law is our choice."""
        if self.timestep_shift == "resolution":
            # 3^(log₄(resolution / 256))
            return float(SHIFT_AT_1024 ** (math.log(self.resolution / 256) / math.log(4)))
        return self.timestep_shift


class FlowMatchingStage(Stage):
    """Flow-matching training, with or without a teacher."""

    kind: Literal["flow_matching"] = "flow_matching"
    """Flow matching, alone or with a teacher."""
    net: Literal["student", "teacher"] = "student"
    """Which net the stage trains: the student, or the teacher whose shape the recipe gives."""
    distillation: DistillationConfig | None = None
    """Knowledge distillation from the teacher; None: none."""
    block_dropout: float = Field(default=0, ge=0, lt=1)
    """Robust training: probability with which each block is left out of a step, so that sub-networks can be compared
    (arXiv 2306.00980, section 3.1, which gives no number)."""

    @rule
    def _check_student_only(self) -> None:
        if self.net == "teacher" and self.distillation is not None:
            raise ValueError("a teacher cannot be distilled into; remove distillation, or train the student")
        if self.net == "teacher" and self.block_dropout:
            raise ValueError("block_dropout applies to the student only; remove it, or train the student")
        if self.block_dropout and self.compile:
            raise ValueError("block_dropout changes the graph at every step; set compile to false")


class AdversarialDistillationStage(Stage):
    """Step distillation with a discriminator on the teacher's tokens and with the teacher's velocity."""

    kind: Literal["adversarial"] = "adversarial"
    """Step distillation with a discriminator (LADD, as SnapGen does)."""
    student_steps: int = Field(default=4, ge=1, le=64)
    """Sampling steps that the student is trained for."""
    adversarial: AdversarialConfig | None = AdversarialConfig()
    """The discriminator; None: none."""
    distillation: DistillationConfig | None = DistillationConfig(features=False)
    """Distillation of the teacher's velocity, in addition to the adversarial loss; None: none."""


class ProgressiveDistillationStage(Stage):
    """Distillation of two DDIM steps of the teacher into one of the student (SnapFusion, arXiv 2306.00980, section 4);
    see `snapgen.objectives.progressive`."""

    kind: Literal["progressive"] = "progressive"
    """Step distillation of two DDIM steps into one (SnapFusion)."""
    teacher: str = "before"
    """Folder of a U-Net with the student's prediction type and text encoders; before: the student itself as it is when
    the stage begins."""
    teacher_steps: int = Field(default=32, ge=2, le=1000)
    """Sampling steps of the teacher; the student's are half as many."""
    cfg_probability: float = Field(default=0.1, ge=0, le=1)
    """Probability of a CFG-aware step; 0: vanilla distillation only."""
    cfg_range: tuple[float, float] = (2, 14)
    """Smallest and largest guidance scale w of the CFG-aware steps."""
    original_loss_weight: float = Field(default=0.2, ge=0)
    """Weight γ of the loss without a teacher, once it is scaled to the distillation loss."""

    @rule
    def _check_steps_and_guidance(self) -> None:
        if self.teacher_steps % 2:
            problem = f"teacher_steps {self.teacher_steps} is odd; two steps become one, so use an even number"
            raise ValueError(problem)
        low, high = self.cfg_range
        if not 0 <= low <= high:
            raise ValueError(f"cfg_range [{low:g}, {high:g}] is not 0 ≤ low ≤ high; the paper's is [2, 14]")

    @property
    def student_steps(self) -> int:
        """Sampling steps that the student is trained for."""
        return self.teacher_steps // 2


class DecoderStage(_NamedStage):
    """Training of a tiny decoder for the autoencoder's frozen encoder (SnapGen, section 3.2)."""

    kind: Literal["decoder"] = "decoder"
    """A tiny decoder for the frozen encoder (SnapGen, section 3.2)."""
    training: DecoderTrainingConfig = DecoderTrainingConfig()
    """How the decoder is trained."""
    decoder: dict[str, Any] = Field(default_factory=dict)
    """The decoder's shape: widths, blocks, mid_blocks, expansion, norm_groups. Empty: the paper's size."""
    max_images: int = Field(default=20_000, ge=2, le=10_000_000)
    """Decoded images kept in memory; the first ones of the set, which are a fair sample of it."""


NetStage = FlowMatchingStage | AdversarialDistillationStage | ProgressiveDistillationStage
"""Any stage that trains a net on latents."""
AnyStage = Annotated[
    FlowMatchingStage | AdversarialDistillationStage | ProgressiveDistillationStage | DecoderStage,
    Field(discriminator="kind"),
]
