"""Recipe of a training run: a YAML with an architecture, its data, its teacher, and a sequence of stages."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PrivateAttr

from archsearch.library import RUNS, FolderName, NamedConfig, read_named
from archsearch.protocol import EvaluationConfig
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.config import Config, rule
from snapgen.diffusion import process, variance_preserving
from snapgen.objectives.teacher import TeacherConfig
from snapgen.training.stages import (
    AdversarialDistillationStage,
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    ProgressiveDistillationStage,
    Stage,
)
from snapgen.training.trackers import TrackerName

BEFORE = "before"
"""Teacher of a progressive stage that is taught by its own net, as it is when the stage begins."""


class TeacherSourceConfig(Config):
    """The teacher: an SD3 transformer by its path, or a small one that a stage of the recipe trains."""

    path: str | None = None
    """Folder of a diffusers SD3Transformer2DModel, or of a pipeline that has one."""
    shape: TeacherConfig | None = None
    """Shape of a teacher that a stage of this recipe trains."""
    text_encoders: tuple[TextEncoderConfig, ...] | None = Field(default=None, min_length=1)
    """The teacher's own text encoders; None: the student's."""
    bfloat16: bool = False
    """Whether the teacher's weights are held in bfloat16 while it teaches."""

    @rule
    def _is_one_of_two(self) -> None:
        if (self.path is None) == (self.shape is None):
            raise ValueError("a teacher has either a path or a shape; give one of the two")


class RecipeEvaluationConfig(EvaluationConfig):
    """Evaluation of a stage's net, at its end and every ``evaluate_every`` images; of a teacher only the loss.

    A stage that distills steps samples with its own number of steps, and after adversarial distillation without
    guidance.
    """

    data: str | None = None
    """Data set of the evaluations: its held-out images and captions, and its training images as the reference of the
    distances; None: the recipe's. Nets of different training sets are compared on one."""
    retrieval: bool = True
    """Whether to measure how often images retrieve their own captions."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grids; empty: held-out captions."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured of a student."""
        distances = ("frechet_distance", "kernel_distance", "copied") if self.num_samples else ()
        retrieval = ("retrieval_r1", "retrieval_r10", "retrieval_mrr") if self.num_samples and self.retrieval else ()
        return ("validation_loss", *distances, *retrieval)


class FigureRow(Config):
    """A row of a figure: one net, sampled in one way."""

    stage: str
    """Stage whose net draws the row."""
    num_inference_steps: int = Field(ge=1, le=1000)
    """Sampling steps."""
    guidance_scale: float = Field(default=1, ge=0, le=100)
    """Guidance scale; 1: no guidance, one evaluation of the net a step instead of two."""


class FigureConfig(Config):
    """A figure of the finished run: in each column a caption and its noise, in each row a net and its sampling."""

    captions: tuple[str, ...] = Field(min_length=1, max_length=64)
    """Captions of the columns; those of training images stand before the others."""
    rows: tuple[FigureRow, ...] = Field(min_length=1, max_length=24)
    """Rows, from top to bottom."""

    @rule
    def _has_captions_of_one_line(self) -> None:
        for number, caption in enumerate(self.captions):
            if not caption.strip():
                raise ValueError(f"captions[{number}] is empty; write a caption")
            if len(caption.splitlines()) > 1:
                raise ValueError(f"captions[{number}] has several lines; write it in one")


class ExpectedShapes(Config):
    """Shapes that the recipe's files must have, so that a plan can be made on machines without those files."""

    downscale_factor: int = Field(ge=1, le=1024)
    """Image pixels along a side for one pixel of the latent."""
    latent_channels: int = Field(ge=1, le=16384)
    """Channels of the autoencoder's latents."""
    text_encoders: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Channels of each text encoder's tokens and of its pooled embedding, by its name or folder."""
    teacher: TeacherConfig | None = None
    """Shape of a teacher that is named by its path."""
    unets: dict[str, str] = Field(default_factory=dict)
    """Architectures (presets or files) of the U-Nets that teach a progressive stage, by their folders."""
    images: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Estimated number of training images; used by the plan, never checked."""
    captions: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Estimated number of distinct captions; None: every image has its own. Used by the plan, never checked."""


class Recipe(NamedConfig):
    """Recipe of one training run, as written in its YAML."""

    name: FolderName
    """Name of the run and of its folder under runs/; by default the name of the file."""
    architecture: str
    """Architecture to train: a preset, a JSON or YAML file, SPACE:base, SPACE/REFERENCE, STUDY:best or STUDY:TRIAL."""
    init_weights: str | None = None
    """Folder of a U-Net to begin with (written by `archsearch convert`, or an earlier run's stage); None: new weights
    from the seed."""
    prediction_type: process.PredictionType = "velocity"
    """Meaning of the student's output. With rectified flow: velocity, data or preconditioned. With the diffusion
    process of Stable Diffusion 1.5: v or noise."""
    data: str = "emoji"
    """emoji, a folder of images, or webdataset shards."""
    autoencoder: str = "emoji"
    """Autoencoder of the latents: emoji, none (pixels), a folder, or OWNER/NAME on the hub."""
    text_encoders: tuple[TextEncoderConfig, ...] = Field(default=(TextEncoderConfig(),), min_length=1)
    """Text encoders of the captions, joined in this order."""
    teacher: TeacherSourceConfig | None = None
    """The net that teaches the stages with distillation."""
    expected_shapes: ExpectedShapes | None = None
    """Shapes of models that are not on this machine, so that --dry-run can plan without them."""
    evaluation: RecipeEvaluationConfig = RecipeEvaluationConfig()
    """Evaluation of the net at the end of a stage and during it."""
    figure: FigureConfig | None = None
    """Figure to draw when all stages are done, as figure.png and figure.csv; None: none."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything random in the run."""
    checkpoint_minutes: float = Field(default=5, ge=0)
    """Minutes between checkpoints; 0: at every report."""
    log_with: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of the run's numbers: tensorboard, trackio, wandb, mlflow. They work offline."""
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    """Stages, trained one after another; `kind` says which settings each has."""

    _source: str = PrivateAttr(default="recipe")

    @rule
    def _teachers_are_available(self) -> None:
        names = [stage.name for stage in self.stages]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"two stages are named {name}; rename one")
        has_teacher = self.teacher is not None and self.teacher.path is not None
        for stage in self.stages:
            if isinstance(stage, FlowMatchingStage) and stage.net == "teacher":
                if self.teacher is None or self.teacher.shape is None:
                    raise ValueError(f"stage {stage.name} trains a teacher without a shape; give teacher.shape")
                has_teacher = True
            elif learns_from_teacher(stage) and not (has_teacher or (self.teacher and stage_teacher(stage))):
                raise ValueError(
                    f"stage {stage.name} needs a teacher; give teacher.path, or train one (net: teacher) before it"
                )

    @rule
    def _stages_fit_the_prediction_type(self) -> None:
        is_diffusion = self.prediction_type in variance_preserving.DIFFUSION_PREDICTION_TYPES
        for number, stage in enumerate(self.stages):
            if isinstance(stage, ProgressiveDistillationStage) and not is_diffusion:
                raise ValueError(f"stage {stage.name} distills DDIM steps; set prediction_type to v or noise")
            has_net_before = self.init_weights is not None or any(map(trains_student, self.stages[:number]))
            if isinstance(stage, ProgressiveDistillationStage) and stage.teacher == BEFORE and not has_net_before:
                raise ValueError(f"stage {stage.name} has no net before it; give init_weights, or its teacher's folder")
            if is_diffusion and learns_from_teacher(stage):
                problem = f"stage {stage.name} needs a teacher of rectified flow, not of {self.prediction_type}"
                raise ValueError(f"{problem}; use kind: progressive, or another prediction_type")
            if is_diffusion and trains_student(stage) and isinstance(stage, Stage) and stage.timestep_shift != 1:
                raise ValueError(f"stage {stage.name}: timestep_shift applies to rectified flow only; leave it out")

    @rule
    def _metrics_to_keep_by_are_measured(self) -> None:
        for stage in self.stages:
            if isinstance(stage, DecoderStage) or stage.keep_best_by is None:
                continue
            metric = stage.keep_best_by
            problem = f"stage {stage.name} keeps the best by {metric}"
            if stage.evaluate_every is None:
                raise ValueError(f"{problem}, but is evaluated at its end only; give evaluate_every")
            if metric != "validation_loss" and trains_teacher(stage):
                raise ValueError(f"{problem}, which is not measured of a teacher; use validation_loss")
            if metric != "validation_loss" and not self.evaluation.num_samples:
                raise ValueError(f"{problem}, which needs samples; raise evaluation.num_samples")
            if metric.startswith("retrieval") and not self.evaluation.retrieval:
                raise ValueError(f"{problem}, which is not measured; set evaluation.retrieval to true")

    @rule
    def _figure_shows_students(self) -> None:
        students = [stage.name for stage in self.stages if trains_student(stage)]
        for row in self.figure.rows if self.figure else ():
            if row.stage not in students:
                problem = f"a row of the figure is of {row.stage!r:.60}, which is no stage that trains the student"
                raise ValueError(f"{problem}; use one of: {', '.join(students)}")

    @property
    def folder(self) -> Path:
        """Folder of the run, under the current directory."""
        return RUNS / self.name

    @property
    def teacher_text_encoders(self) -> tuple[TextEncoderConfig, ...]:
        """Text encoders of the teacher: its own, or those of the student."""
        return (
            self.text_encoders
            if self.teacher is None or self.teacher.text_encoders is None
            else self.teacher.text_encoders
        )


def learns_from_teacher(stage: AnyStage) -> bool:
    """Whether a stage learns from the recipe's teacher."""
    if isinstance(stage, AdversarialDistillationStage):
        return stage.distillation is not None or stage.adversarial is not None
    return isinstance(stage, FlowMatchingStage) and stage.distillation is not None


def stage_teacher(stage: AnyStage) -> str | None:
    """Folder of a stage's own teacher; None if it has none or does not learn from a teacher."""
    return None if isinstance(stage, DecoderStage) or not learns_from_teacher(stage) else stage.teacher


def unet_teacher(stage: AnyStage) -> str | None:
    """Folder of the U-Net that teaches a progressive stage; None if there is none or the stage's own net teaches."""
    return stage.teacher if isinstance(stage, ProgressiveDistillationStage) and stage.teacher != BEFORE else None


def resolutions_of(stage: AnyStage) -> tuple[int, ...]:
    """Resolutions of a stage's images, in pixels."""
    return stage.training.resolutions if isinstance(stage, DecoderStage) else (stage.resolution,)


def trains_student(stage: AnyStage) -> bool:
    """Whether a stage trains the student, and not the teacher or a decoder."""
    return not isinstance(stage, DecoderStage) and not trains_teacher(stage)


def trains_teacher(stage: AnyStage) -> bool:
    """Whether a stage trains the teacher."""
    return isinstance(stage, FlowMatchingStage) and stage.net == "teacher"


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by its name, or a recipe's YAML file by its path.

    Raises:
        InputError: if the file does not exist or is invalid.
    """
    path, values = read_named(name_or_path, ("training",))
    return Recipe.parse(values, path)
