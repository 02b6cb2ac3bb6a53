"""Check that models that a recipe names fit together, by their shapes, and digest the contents that a run keeps to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from archsearch.quality.resolve import SPLITS
from archsearch.studies.lookup import find_architecture
from archsearch.training.recipe import (
    ExpectedShapes,
    Recipe,
    learns_from_teacher,
    resolutions_of,
    stage_teacher,
    unet_teacher,
)
from archsearch.training.run_folder import unet_arch
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.training import build_tiny_decoder
from snapgen.conditioning import captions, text_encoder
from snapgen.conditioning.captions import ConditioningDims
from snapgen.data.dataset import source_digest
from snapgen.errors import InputError
from snapgen.io import pretrained
from snapgen.io.digests import digest_contents
from snapgen.io.prediction_type import check_prediction_type
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
    """Shapes of everything that a recipe names."""

    factor: int
    """Image pixels along a side for one pixel of the latent."""
    latent_channels: int
    encoders: dict[str, tuple[int, int]]
    """Channels of each text encoder's tokens and of its pooled embedding, by its name or folder."""
    context: ConditioningDims
    """Dimensions of the student's conditioning."""
    teacher_context: ConditioningDims
    """Dimensions of the teacher's conditioning."""
    teachers: dict[str | None, Teacher]
    """Teachers on the meta device: those of single stages by their folders, that of the recipe at None."""
    unets: dict[str, Architecture] = field(default_factory=dict)
    """Architectures of the U-Nets that teach progressive stages, by their folders."""
    missing: list[str] = field(default_factory=list)
    """Sources that are not on this machine, whose shapes are those that the recipe expects."""

    def teacher(self, stage: AnyStage) -> Teacher | None:
        """Teacher that a stage trains or learns from, if any."""
        return self.teachers[stage_teacher(stage)] if _uses_teacher(stage) else None

    def unet(self, stage: AnyStage, arch: Architecture) -> UNet | None:
        """U-Net that teaches a progressive stage, frozen, on the meta device.

        Args:
            arch: architecture of the student, which the stage's own net has.
        """
        if not isinstance(stage, ProgressiveDistillationStage):
            return None
        folder = unet_teacher(stage)
        with torch.device("meta"):
            unet = UNet(arch if folder is None else self.unets[folder])
        unet.requires_grad_(False)
        return unet


def resolve_shapes(recipe: Recipe, *, without_files: bool = False) -> ResolvedShapes:
    """Resolve the shapes of everything that a recipe names.

    Args:
        without_files: whether to use ``expected_shapes`` for files that are missing.

    Raises:
        InputError: if a file is missing and has no expected shape, or its shape is not the expected one.
    """
    reader = _Reader(recipe, without_files)
    factor, channels = reader.autoencoder()
    names = dict.fromkeys(e.encoder for e in (*recipe.text_encoders, *recipe.teacher_text_encoders))
    encoders = {name: reader.encoder(name) for name in names}

    def dims(configs: tuple[captions.TextEncoderConfig, ...]) -> ConditioningDims:
        return captions.conditioning_dims(configs, [encoders[config.encoder] for config in configs])

    context, teacher_context = dims(recipe.text_encoders), dims(recipe.teacher_text_encoders)
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
    """Reads shapes from files, or uses those that the recipe expects if the files are missing."""

    def __init__(self, recipe: Recipe, without_files: bool) -> None:
        self.recipe, self.missing = recipe, list[str]()
        self.fallback: ExpectedShapes | None = recipe.expected_shapes if without_files else None

    def autoencoder(self) -> tuple[int, int]:
        """Downscale factor and latent channels of the autoencoder."""
        expected = self.recipe.expected_shapes

        def load() -> tuple[int, int]:
            loaded = autoencoder.load_autoencoder(self.recipe.autoencoder)
            return loaded.factor, loaded.latent_channels

        shapes = self.fallback
        fallback = None if shapes is None else (shapes.downscale_factor, shapes.latent_channels)
        factor, channels = self._read("autoencoder", load, fallback)
        if expected is not None:
            self._check_expected("downscale_factor", factor, expected.downscale_factor)
            self._check_expected("latent_channels", channels, expected.latent_channels)
        return factor, channels

    def encoder(self, name: str) -> tuple[int, int]:
        """Channels of a text encoder's tokens and of its pooled embedding."""
        fallback = self.fallback.text_encoders.get(name) if self.fallback else None
        place = "text_encoders"
        if name not in [encoder.encoder for encoder in self.recipe.text_encoders]:
            place = "teacher.text_encoders"
        dims = self._read(place, lambda: (text_encoder.width(name), text_encoder.pooled_width(name)), fallback)
        if self.recipe.expected_shapes is not None:
            expected = self.recipe.expected_shapes.text_encoders.get(name, dims)
            self._check_expected(f"text_encoders.{name}", dims, expected)
        return dims

    def teacher(self, path: str, factor: int, channels: int, widths: ConditioningDims) -> Teacher:
        """Teacher in a folder, on the meta device."""
        shape = self.fallback.teacher if self.fallback else None
        fallback = None if shape is None else teacher_on_meta(self.recipe, shape, factor, channels, widths)
        return self._read(self._place_of_teacher(path), lambda: teacher.load_on_meta(Path(path)), fallback)

    def unet(self, path: str) -> Architecture:
        """Architecture of the teaching U-Net in a folder."""
        expected = self.fallback.unets.get(path) if self.fallback else None

        def load() -> Architecture:
            if not Path(path).is_dir():
                remedy = "name the folder of a U-Net that a run's stage or archsearch convert wrote"
                raise InputError(path, "is not a folder", remedy)
            arch = unet_arch(Path(path))
            check_prediction_type(Path(path), self.recipe.prediction_type, required=True)
            return arch

        fallback = None if expected is None else find_architecture(expected)
        return self._read(self._place_of_teacher(path), load, fallback)

    def _place_of_teacher(self, path: str) -> str:
        """The setting that names a teacher's folder."""
        stages = enumerate(self.recipe.stages)
        own = (f"stages[{i}].teacher" for i, stage in stages if path in (stage_teacher(stage), unet_teacher(stage)))
        return next(own, "teacher.path")

    def _read(self, place: str, load: Callable[[], T], fallback: T | None) -> T:
        """The loaded value, or the fallback if loading fails; the missing source is recorded.

        Raises:
            InputError: if there is no fallback; it names the recipe and the setting ``place``.
        """
        with self.recipe.error_context(place):
            try:
                return load()
            except InputError as error:
                if fallback is None:
                    raise
                self.missing.append(error.source)
                return fallback

    def _check_expected(self, name: str, actual: object, expected: object) -> None:
        if actual != expected:
            problem = f"is {expected}; the files give {actual}"
            remedy = "name the files that the recipe was written for, or change what it expects"
            raise InputError(self.recipe.source, problem, remedy, place=f"expected_shapes.{name}")


def teacher_on_meta(
    recipe: Recipe, shape: TeacherConfig, factor: int, channels: int, widths: ConditioningDims
) -> Teacher:
    """Build a teacher of a given shape on the meta device.

    Raises:
        InputError: if the shape is invalid.
    """
    with torch.device("meta"):
        return new_teacher(recipe, shape, factor, channels, widths)


def new_teacher(recipe: Recipe, shape: TeacherConfig, factor: int, channels: int, widths: ConditioningDims) -> Teacher:
    """Build an untrained teacher of a given shape, large enough for every stage.

    Raises:
        InputError: if the shape is invalid.
    """
    largest = max(stage.resolution for stage in recipe.stages if isinstance(stage, Stage))
    return teacher.new_teacher(
        shape.model_dump(),
        latent_channels=channels,
        context_dim=widths.context,
        pooled_width=widths.pooled,
        sample_size=largest // factor,
        seed=seeding.derive_seed(recipe.seed, "teacher weights"),
        source=recipe.source,
    )


def check_recipe(recipe: Recipe, arch: Architecture, shapes: ResolvedShapes, *, processes: int = 1) -> None:
    """Check that architecture, autoencoder, text encoders, teachers and stages fit together.

    Args:
        processes: number of processes that share each batch.

    Raises:
        InputError: if something does not fit; it names the recipe and the setting.
    """

    def reject(place: str, problem: str, remedy: str) -> NoReturn:
        raise InputError(recipe.source, problem, remedy, place=place)

    for problem, _ in _misfits(arch, shapes):
        reject("architecture", problem, "make them equal")
    for net in shapes.teachers.values():
        net.check_padding(recipe.teacher_text_encoders)
    for number, stage in enumerate(recipe.stages):
        place = f"stages[{number}]"
        if isinstance(stage, DecoderStage):
            try:
                build_tiny_decoder(shapes, seed=0, **stage.decoder)
            except InputError as error:
                reject(f"{place}.{error.place or 'decoder'}", error.problem, error.remedy)
            for side in stage.training.resolutions:
                if side % shapes.factor:
                    problem = f"{side} px does not fit the autoencoder"
                    reject(f"{place}.training.resolutions", problem, f"use multiples of {shapes.factor}")
            continue
        size, rest = divmod(stage.resolution, shapes.factor)
        if rest or size % arch.stride:
            multiple = shapes.factor * arch.stride
            problem = f"{stage.resolution} px does not fit the net"
            reject(f"{place}.resolution", problem, f"use a multiple of {multiple}")
        if stage.batch_size % (stage.gradient_accumulation_steps * processes):
            divisor = f"{processes} processes × {stage.gradient_accumulation_steps} accumulation steps"
            problem = f"batch_size {stage.batch_size} is not a multiple of {divisor}"
            reject(f"{place}.batch_size", problem, "use a multiple, or other gradient_accumulation_steps")
        folder = unet_teacher(stage)
        if folder is not None:
            with recipe.error_context(f"{place}.teacher"):
                _check_unet(folder, shapes.unets[folder], shapes, size)
        teacher_net = shapes.teacher(stage)
        if teacher_net is not None:
            with recipe.error_context(f"{place}.teacher" if stage_teacher(stage) else "teacher"):
                teacher_net.check(
                    latent_channels=shapes.latent_channels,
                    latent_size=size,
                    context_dim=shapes.teacher_context.context,
                    pooled_width=shapes.teacher_context.pooled,
                )
                trained_params(recipe, arch, stage, teacher_net)


def _misfits(arch: Architecture, shapes: ResolvedShapes) -> Iterator[tuple[str, str]]:
    """Misfits with the autoencoder and the text encoders, each with its remedy if the net is a teacher."""
    if arch.latent_channels != shapes.latent_channels:
        problem = f"has {arch.latent_channels} latent channels; the autoencoder gives {shapes.latent_channels}"
        yield problem, "name a teacher for the same autoencoder"
    if arch.has_cross_attention and arch.context_dim != shapes.context.context:
        problem = f"takes a context {arch.context_dim} wide; the text encoders give {shapes.context.context}"
        yield problem, "name a teacher of the student's text encoders"


def _check_unet(folder: str, arch: Architecture, shapes: ResolvedShapes, size: int) -> None:
    """Check that a U-Net can teach on a stage's latents and captions."""
    for problem, remedy in _misfits(arch, shapes):
        raise InputError(folder, problem, remedy)
    if size % arch.stride:
        problem = f"needs latents whose size is a multiple of {arch.stride}; those of the stage have {size}"
        raise InputError(folder, problem, "change the resolution")


def trained_params(recipe: Recipe, arch: Architecture, stage: NetStage, teacher_or_none: Teacher | UNet | None) -> int:
    """Number of parameters that a stage trains: those of its net, feature projector and discriminator heads.

    Raises:
        InputError: if the teacher lacks the blocks that the discriminator reads features from.
    """
    is_teacher = isinstance(stage, FlowMatchingStage) and stage.net == "teacher"
    frozen = None if is_teacher else teacher_or_none
    with torch.device("meta"):
        net = teacher_or_none if is_teacher else UNet(arch)
        assert net is not None
        net.requires_grad_(True)
        if frozen is not None:
            frozen.requires_grad_(False)
        objectives, _ = build_objectives(stage, net, frozen, prediction=recipe.prediction_type, seed=0)
    parameters = (parameter for objective in objectives.values() for parameter in objective.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def contents_of(recipe: Recipe, shapes: ResolvedShapes) -> dict[str, str]:
    """Digests of data, autoencoder, text encoders, teachers and initial weights, by the setting that names them.

    Args:
        recipe: the recipe.
        shapes: its resolved shapes, with the folders of its teachers.

    Raises:
        InputError: if something is missing or unreadable.
    """
    contents = {"autoencoder": autoencoder.digest(recipe.autoencoder)}
    for side in sorted({side for stage in recipe.stages for side in resolutions_of(stage)}):
        for split in SPLITS:
            contents[f"data ({split}, {side} px)"] = source_digest(recipe.data, split=split, resolution=side)
    for place, encoders in (
        ("text_encoders", recipe.text_encoders),
        ("teacher.text_encoders", recipe.teacher_text_encoders),
    ):
        for number, encoder in enumerate(encoders):
            contents[f"{place}[{number}].encoder"] = text_encoder.digest(encoder.encoder)
    for own, net in shapes.teachers.items():
        if own is not None or (recipe.teacher is not None and recipe.teacher.path is not None):
            contents[f"teacher {own}" if own else "teacher.path"] = net_digest(Path(net.source))
    for folder in filter(None, map(unet_teacher, recipe.stages)):
        contents[f"teacher {folder}"] = net_digest(Path(folder))
    if recipe.init_weights is not None:
        contents["init_weights"] = net_digest(Path(recipe.init_weights))
    return contents


def net_digest(folder: Path) -> str:
    """Digest of a net's weights and configuration."""
    return digest_contents([folder / pretrained.CONFIG_NAME, *pretrained.weight_files(folder)])
