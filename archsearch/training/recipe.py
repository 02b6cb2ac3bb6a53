"""A training's recipe: a YAML of an architecture, its data, its teacher, and stages one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from archsearch.library import RUNS, FolderName, read_named
from archsearch.protocol import Samples
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import BASE
from snapgen import config
from snapgen.architecture import presets
from snapgen.architecture.schema import Architecture
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.config import Config
from snapgen.diffusion import process, variance_preserving
from snapgen.errors import InputError
from snapgen.objectives.teacher import TeacherConfig
from snapgen.training.stages import (
    AdversarialDistillationStage,
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    ProgressiveDistillationStage,
    Stage,
)

BEFORE = "before"
"""A halving stage's teacher: its own net, as it stands where the stage begins."""


class TeacherSourceConfig(Config):
    """The net that teaches: an SD3 transformer by path, or a small one that a stage of the recipe trains."""

    path: str | None = None
    """Folder of a diffusers SD3Transformer2DModel, or of a pipeline that has one."""
    shape: TeacherConfig | None = None
    """Of one that is built and trained here."""
    text: tuple[TextEncoderConfig, ...] | None = None
    """Its own text encoders; None: the student's."""
    bfloat16: bool = False
    """Of its weights where it teaches."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.path is None) == (self.shape is None):
            raise ValueError("a teacher is a path or a shape; give one of the two")
        return self


class EvaluationConfig(Config):
    """How a stage's net is judged, at its end and, without distances, on the way."""

    pairs: int = Field(default=512, ge=2)
    """Fixed (image, t, noise) triples behind the validation loss."""
    steps: int = Field(default=28, ge=1, le=1000)
    """Of the sampler; a stage of few steps has its own."""
    guidance: float = Field(default=3, ge=0, le=100)
    """Of the sampler; 1 after step distillation."""
    samples: Samples = 256
    """Images drawn for the distances and for retrieval; 0: none."""
    extractor: str = "efficientnet-lite0"
    feature_resolution: int = Field(default=64, ge=32, le=1024)
    retrieval: bool = True
    """Whether it is measured how often images call for their own captions (`archsearch.quality.retrieval`)."""
    prompts: tuple[str, ...] = ()
    """Of the sample grids; empty: held-out captions."""


class ExpectedShapes(Config):
    """What files that are not on every machine must turn out to be: a plan can be made without them."""

    factor: int = Field(ge=1)
    """Of the autoencoder: pixels along a side for one of the latent."""
    latent_channels: int = Field(ge=1)
    encoders: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Channels of a text encoder's tokens and of its pooled embedding, by its name or folder."""
    teacher: TeacherConfig | None = None
    """Of teachers by path."""
    unets: dict[str, str] = Field(default_factory=dict)
    """Architectures (presets or files) of the U-Nets that teach a halving stage, by their folders."""
    images: int | None = Field(default=None, ge=1)
    """For training. Unlike the others, this and ``captions`` are estimates that nothing is held to."""
    captions: int | None = Field(default=None, ge=1)
    """Of these images that differ from each other; None: each image has its own."""


class Recipe(Config):
    """One training, as its YAML has it."""

    name: FolderName
    arch: str
    """A preset, a JSON or YAML file, SPACE:base, STUDY:best or STUDY:TRIAL."""
    weights: str | None = None
    """Folder of a U-Net to begin with (`archsearch convert`, an earlier run's stage); None: weights from the seed."""
    prediction: process.PredictionType = "velocity"
    """What the student's output stands for: velocity, data or preconditioned, of rectified flow; v or noise, of the
    diffusion process of Stable Diffusion 1.5."""
    data: str = "emoji"
    autoencoder: str = "emoji"
    text: tuple[TextEncoderConfig, ...] = (TextEncoderConfig(),)
    teacher: TeacherSourceConfig | None = None
    expected: ExpectedShapes | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    checkpoint_minutes: float = Field(default=5, ge=0)
    """Between checkpoints; 0: at every report."""
    stages: tuple[AnyStage, ...] = Field(min_length=1)

    _source: str = PrivateAttr(default="recipe")

    @model_validator(mode="after")
    def _stages_follow_from_each_other(self) -> Self:
        names = [stage.name for stage in self.stages]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(f"two stages are called {name}; rename one")
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
        return self

    @model_validator(mode="after")
    def _stages_are_of_the_process(self) -> Self:
        is_diffusion = self.prediction in variance_preserving.DIFFUSION_PREDICTION_TYPES
        for number, stage in enumerate(self.stages):
            if isinstance(stage, ProgressiveDistillationStage) and not is_diffusion:
                raise ValueError(f"stage {stage.name} halves DDIM's steps; set prediction to v or noise")
            has_before = self.weights is not None or any(map(trains_student, self.stages[:number]))
            if isinstance(stage, ProgressiveDistillationStage) and stage.teacher == BEFORE and not has_before:
                raise ValueError(f"stage {stage.name} has no net before it; give weights, or its teacher's folder")
            if is_diffusion and learns_from_teacher(stage):
                problem = f"stage {stage.name} learns from a teacher of rectified flow, not of {self.prediction}"
                raise ValueError(f"{problem}; use kind: halving, or another prediction")
            if is_diffusion and trains_student(stage) and isinstance(stage, Stage) and stage.shift != 1:
                raise ValueError(f"stage {stage.name}: shift is rectified flow's, SD's schedule is fixed; leave it out")
        return self

    @property
    def source(self) -> str:
        """The file it was read from, for errors."""
        return self._source

    @property
    def folder(self) -> Path:
        """The run's folder, under the current directory."""
        return RUNS / self.name

    @property
    def teacher_text(self) -> tuple[TextEncoderConfig, ...]:
        """The teacher's text encoders."""
        return self.text if self.teacher is None or self.teacher.text is None else self.teacher.text

    def changed(self, values: dict[str, Any]) -> Recipe:
        """This recipe with some fields changed, and checked again."""
        found = config.parse_config({**self.model_dump(mode="json"), **values}, Recipe, source=self.source)
        found._source = self._source
        return found


def learns_from_teacher(stage: AnyStage) -> bool:
    """Whether a stage has a use for the teacher."""
    if isinstance(stage, AdversarialDistillationStage):
        return stage.distillation is not None or stage.adversarial is not None
    return isinstance(stage, FlowMatchingStage) and stage.distillation is not None


def stage_teacher(stage: AnyStage) -> str | None:
    """The folder of a stage's own teacher, if it has one and a use for it."""
    return None if isinstance(stage, DecoderStage) or not learns_from_teacher(stage) else stage.teacher


def unet_teacher(stage: AnyStage) -> str | None:
    """The folder of the U-Net that teaches a stage; None: it has none, or its own net."""
    return stage.teacher if isinstance(stage, ProgressiveDistillationStage) and stage.teacher != BEFORE else None


def resolutions_of(stage: AnyStage) -> tuple[int, ...]:
    """The resolutions of a stage's images, in pixels."""
    return stage.training.resolutions if isinstance(stage, DecoderStage) else (stage.resolution,)


def trains_student(stage: AnyStage) -> bool:
    """Whether a stage trains the student."""
    return not isinstance(stage, DecoderStage) and not (isinstance(stage, FlowMatchingStage) and stage.net == "teacher")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by its name, or one's own by its path.

    Raises:
        InputError: naming the file, the place and the remedy.
    """
    path, values = read_named(name_or_path, ("training",))
    found = config.parse_config(values, Recipe, source=path)
    found._source = str(path)
    return found


def architecture(name: str) -> Architecture:
    """The architecture of a preset, a file, ``SPACE:base``, ``STUDY:best`` or ``STUDY:TRIAL``.

    Raises:
        InputError: if it is none of these, or the study has no such trial.
    """
    study_name, colon, which = name.rpartition(":")
    if not colon or Path(name).exists():
        return presets.resolve(name, besides=("SPACE:base", "STUDY:best", "STUDY:TRIAL"))
    if which == BASE:
        return load_space(study_name).base
    from archsearch.studies.config.study import load_config as find_study
    from archsearch.studies.search.candidates import best, load_candidates
    from archsearch.studies.storage.database import load_study

    study = load_study(find_study(study_name))
    if which == "best":
        return best(study).candidate.architecture
    candidates = {str(c.number): c for c in load_candidates(study, artifacts=False)}
    if which not in candidates:
        some = ", ".join(list(candidates)[:5])
        raise InputError(name, f"has no trial {which}", f"use best, or one of its trials: {some}, …")
    return candidates[which].architecture
