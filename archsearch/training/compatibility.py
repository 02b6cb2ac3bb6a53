"""Whether a recipe's parts fit together: the shapes of what it names, read from the files or as the recipe expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from archsearch.training.recipe import (
    ExpectedShapes,
    Recipe,
    architecture,
    learns_from_teacher,
    stage_teacher,
    unet_teacher,
)
from archsearch.training.run_folder import check_prediction, unet_arch
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.training import build_tiny_decoder
from snapgen.conditioning import captions, text_encoder
from snapgen.conditioning.captions import ConditioningDims
from snapgen.errors import InputError
from snapgen.models.unet import UNet
from snapgen.objectives import teacher
from snapgen.objectives.build import build_objectives
from snapgen.objectives.teacher import Teacher, TeacherConfig
from snapgen.training.stages import (
    AnyStage,
    DecoderStage,
    FlowMatchingStage,
    NetStage,
    ProgressiveDistillationStage,
    Stage,
)

T = TypeVar("T")


@dataclass(frozen=True)
class ResolvedShapes:
    """Of everything that a recipe names."""

    factor: int
    latent_channels: int
    encoders: dict[str, tuple[int, int]]
    """Channels of each text encoder's tokens and of its pooled embedding."""
    context: ConditioningDims
    """Of the student."""
    teacher_context: ConditioningDims
    teachers: dict[str | None, Teacher]
    """Stages' own, by their folders, and the recipe's, at None; on the meta device."""
    unets: dict[str, Architecture] = field(default_factory=dict)
    """U-Nets that teach, by their folders."""
    missing: list[str] = field(default_factory=list)
    """What is not on this machine, and was taken as the recipe expects it."""

    def teacher(self, stage: AnyStage) -> Teacher | None:
        """The one that a stage trains or learns from."""
        return self.teachers[stage_teacher(stage)] if _uses_teacher(stage) else None

    def unet(self, stage: AnyStage, arch: Architecture) -> UNet | None:
        """The U-Net that teaches a stage, frozen, on the meta device; ``arch`` is the student's."""
        if not isinstance(stage, ProgressiveDistillationStage):
            return None
        folder = unet_teacher(stage)
        with torch.device("meta"):
            unet = UNet(arch if folder is None else self.unets[folder])
        unet.requires_grad_(False)
        return unet


def shapes(recipe: Recipe, *, without_files: bool = False) -> ResolvedShapes:
    """The shapes of what a recipe names.

    Args:
        without_files: take what is missing as ``expected`` says.

    Raises:
        InputError: if something is missing that nothing is expected of, or it is not as expected.
    """
    reader = _Reader(recipe, without_files)
    factor, channels = reader.coder()
    names = dict.fromkeys(e.encoder for e in (*recipe.text, *recipe.teacher_text))
    encoders = {name: reader.encoder(name) for name in names}

    def widths(of: tuple[captions.TextEncoderConfig, ...]) -> ConditioningDims:
        return captions.widths(of, [encoders[e.encoder] for e in of])

    context, teacher_context = widths(recipe.text), widths(recipe.teacher_text)
    teachers: dict[str | None, Teacher] = {}
    if recipe.teacher is not None:
        for own in dict.fromkeys(stage_teacher(stage) for stage in recipe.stages if _uses_teacher(stage)):
            path = own or recipe.teacher.path
            if path is not None:
                teachers[own] = reader.teacher(path, factor, channels, teacher_context)
            elif recipe.teacher.shape is not None:
                teachers[own] = teacher_on_meta(recipe, recipe.teacher.shape, factor, channels, teacher_context)
    folders = dict.fromkeys(folder for stage in recipe.stages if (folder := unet_teacher(stage)) is not None)
    unets = {folder: reader.unet(folder) for folder in folders}
    return ResolvedShapes(factor, channels, encoders, context, teacher_context, teachers, unets, reader.missing)


def _uses_teacher(stage: AnyStage) -> bool:
    return learns_from_teacher(stage) or (isinstance(stage, FlowMatchingStage) and stage.net == "teacher")


class _Reader:
    """Reads what files say, or takes what the recipe expects where they are missing."""

    def __init__(self, recipe: Recipe, without_files: bool) -> None:
        self.recipe, self.missing = recipe, list[str]()
        self.guesses: ExpectedShapes | None = recipe.expected if without_files else None

    def coder(self) -> tuple[int, int]:
        """Factor and latent channels of the autoencoder."""
        expected = self.recipe.expected

        def found() -> tuple[int, int]:
            coder = autoencoder.load_autoencoder(self.recipe.autoencoder)
            return coder.factor, coder.latent_channels

        given = self._read(found, (self.guesses.factor, self.guesses.latent_channels) if self.guesses else None)
        if expected is not None:
            self._hold("factor", given[0], expected.factor)
            self._hold("latent_channels", given[1], expected.latent_channels)
        return given

    def encoder(self, name: str) -> tuple[int, int]:
        """Channels of a text encoder's tokens and of its pooled embedding."""
        guess = self.guesses.encoders.get(name) if self.guesses else None
        given = self._read(lambda: (text_encoder.width(name), text_encoder.pooled_width(name)), guess)
        if self.recipe.expected is not None:
            self._hold(f"encoders.{name}", given, self.recipe.expected.encoders.get(name, given))
        return given

    def teacher(self, path: str, factor: int, channels: int, widths: ConditioningDims) -> Teacher:
        """A teacher by its folder."""
        shape = self.guesses.teacher if self.guesses else None
        guess = None if shape is None else teacher_on_meta(self.recipe, shape, factor, channels, widths)
        return self._read(lambda: teacher.load_on_meta(Path(path)), guess)

    def unet(self, path: str) -> Architecture:
        """The architecture of a U-Net that teaches, by its folder."""
        named = self.guesses.unets.get(path) if self.guesses else None

        def found() -> Architecture:
            if not Path(path).is_dir():
                remedy = "name the folder of a U-Net of ours, as a run's stage or archsearch convert leaves it"
                raise InputError(path, "is no folder", remedy)
            own = unet_arch(Path(path))
            check_prediction(Path(path), self.recipe.prediction)
            return own

        return self._read(found, None if named is None else architecture(named))

    def _read(self, found: Callable[[], T], guess: T | None) -> T:
        try:
            return found()
        except InputError as error:
            if guess is None:
                raise
            self.missing.append(error.source)
            return guess

    def _hold(self, name: str, given: object, expected: object) -> None:
        if given != expected:
            problem = f"is {expected}; the files give {given}"
            remedy = "name the files that the recipe was written for, or change what it expects"
            raise InputError(self.recipe.source, problem, remedy, place=f"expected.{name}")


def teacher_on_meta(
    recipe: Recipe, shape: TeacherConfig, factor: int, channels: int, widths: ConditioningDims
) -> Teacher:
    """A teacher of a shape on the meta device.

    Raises:
        InputError: if there can be no such net.
    """
    with torch.device("meta"):
        return new_teacher(recipe, shape, factor, channels, widths)


def new_teacher(recipe: Recipe, shape: TeacherConfig, factor: int, channels: int, widths: ConditioningDims) -> Teacher:
    """A teacher of a shape, untrained, large enough for every stage.

    Raises:
        InputError: if there can be no such net.
    """
    largest = max(stage.resolution for stage in recipe.stages if isinstance(stage, Stage))
    return teacher.new_teacher(
        shape.model_dump(),
        latent_channels=channels,
        context_width=widths.context,
        pooled_width=widths.pooled,
        sample_size=largest // factor,
        seed=seeding.derive_seed(recipe.seed, "teacher weights"),
        source=recipe.source,
    )


def check_recipe(recipe: Recipe, arch: Architecture, given: ResolvedShapes, *, processes: int = 1) -> None:
    """Whether architecture, autoencoder, text encoders, teachers and stages fit together.

    Raises:
        InputError: naming the recipe and the place.
    """

    def refuse(place: str, problem: str, remedy: str) -> NoReturn:
        raise InputError(recipe.source, problem, remedy, place=place)

    if arch.latent_channels != given.latent_channels:
        problem = f"has {arch.latent_channels} latent channels; the autoencoder gives {given.latent_channels}"
        refuse("arch", problem, "make them equal")
    if arch.has_cross_attention and arch.context_width != given.context.context:
        problem = f"takes a context {arch.context_width} wide; the text encoders give {given.context.context}"
        refuse("arch", problem, "make them equal")
    for number, stage in enumerate(recipe.stages):
        place = f"stages[{number}]"
        if isinstance(stage, DecoderStage):
            try:
                build_tiny_decoder(given, seed=0, **stage.decoder)
            except InputError as error:
                refuse(f"{place}.{error.place or 'decoder'}", error.problem, error.remedy)
            for side in stage.training.resolutions:
                if side % given.factor:
                    problem = f"{side} px do not fit the autoencoder"
                    refuse(f"{place}.training.resolutions", problem, f"use multiples of {given.factor}")
            continue
        size, rest = divmod(stage.resolution, given.factor)
        if rest or size % arch.stride:
            by = given.factor * arch.stride
            refuse(f"{place}.resolution", f"{stage.resolution} px do not fit the net", f"use a multiple of {by}")
        if stage.batch % (stage.accumulate * processes):
            problem = f"batch {stage.batch} does not fall into {processes} × {stage.accumulate} equal parts"
            refuse(f"{place}.batch", problem, "use a multiple, or another accumulate")
        folder = unet_teacher(stage)
        if folder is not None:
            _check_unet(folder, given.unets[folder], given, size)
        teaches = given.teacher(stage)
        if teaches is not None:
            teaches.check(
                latent_channels=given.latent_channels,
                latent_size=size,
                context_width=given.teacher_context.context,
                pooled_width=given.teacher_context.pooled,
            )
            trained_params(recipe, arch, stage, teaches)


def _check_unet(folder: str, arch: Architecture, given: ResolvedShapes, size: int) -> None:
    """Whether a U-Net can teach on a stage's latents and captions."""
    if arch.latent_channels != given.latent_channels:
        problem = f"has {arch.latent_channels} latent channels; the autoencoder gives {given.latent_channels}"
        raise InputError(folder, problem, "name a teacher for the same autoencoder")
    if arch.has_cross_attention and arch.context_width != given.context.context:
        problem = f"takes a context {arch.context_width} wide; the text encoders give {given.context.context}"
        raise InputError(folder, problem, "name a teacher of the student's text encoders")
    if size % arch.stride:
        problem = f"takes latents whose sides {arch.stride} divides, the stage's have {size}"
        raise InputError(folder, problem, "change the resolution")


def trained_params(recipe: Recipe, arch: Architecture, stage: NetStage, teacher_or_none: Teacher | UNet | None) -> int:
    """Parameters that a stage trains: its net's, a projector's, a discriminator's heads'.

    Raises:
        InputError: if the teacher has no such blocks as the discriminator is to look at.
    """
    is_teacher = isinstance(stage, FlowMatchingStage) and stage.net == "teacher"
    teaches = None if is_teacher else teacher_or_none
    with torch.device("meta"):
        net = teacher_or_none if is_teacher else UNet(arch)
        assert net is not None
        net.requires_grad_(True)
        if teaches is not None:
            teaches.requires_grad_(False)
        trained, _ = build_objectives(stage, net, teaches, prediction=recipe.prediction, seed=0)
    return sum(weight.numel() for turn in trained.values() for weight in turn.parameters() if weight.requires_grad)
