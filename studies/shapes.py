"""Whether a recipe's parts fit together: the shapes of what it names, read from the files or as the recipe expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from snapgen import autoencoder, conditioning, seeds, teacher
from snapgen.arch import Architecture
from snapgen.conditioning import Widths
from snapgen.decoder_training import tiny_decoder_for
from snapgen.errors import InputError
from snapgen.stages import DecoderStage, FlowStage, Stage
from snapgen.teacher import Teacher
from studies.recipe import Recipe, learns_from_teacher

T = TypeVar("T")


@dataclass(frozen=True)
class Shapes:
    """Of everything that a recipe names."""

    factor: int
    latent_channels: int
    context: Widths
    """Of the student."""
    teacher_context: Widths
    teacher: Teacher | None
    """On the meta device; None: the recipe has none."""
    missing: list[str] = field(default_factory=list)
    """What is not on this machine, and was taken as the recipe expects it."""


def shapes(recipe: Recipe, *, without_files: bool = False) -> Shapes:
    """The shapes of what a recipe names.

    Args:
        without_files: take what is missing as ``expected`` says.

    Raises:
        InputError: if something is missing that nothing is expected of, or it is not as expected.
    """
    expected, missing = recipe.expected, list[str]()

    def read(found: Callable[[], T], otherwise: Callable[[], T | None]) -> T:
        try:
            return found()
        except InputError as error:
            instead = otherwise() if without_files else None
            if instead is None:
                raise
            missing.append(error.source)
            return instead

    def coder() -> tuple[int, int]:
        found = autoencoder.load(recipe.autoencoder)
        return found.factor, found.latent_channels

    def guessed_coder() -> tuple[int, int] | None:
        return (expected.factor, expected.latent_channels) if expected else None

    def guessed_widths(of_teacher: bool) -> Widths | None:
        if expected is None:
            return None
        tokens, width = (expected.teacher_context if of_teacher else None) or expected.context
        return Widths(context=width, tokens=tokens, pooled=expected.pooled if of_teacher else 0)

    factor, channels = read(coder, guessed_coder)
    context = read(lambda: conditioning.widths(recipe.text), lambda: guessed_widths(False))
    teacher_context = read(lambda: conditioning.widths(recipe.teacher_text), lambda: guessed_widths(True))
    if expected is not None:
        values = {
            "factor": (factor, expected.factor),
            "latent_channels": (channels, expected.latent_channels),
            "context": ((context.tokens, context.context), expected.context),
        }
        for name, (ours, theirs) in values.items():
            if ours != theirs:
                remedy = "name the files that the recipe was written for, or change what it expects"
                raise InputError(recipe.source, f"is {theirs}; the files give {ours}", remedy, place=f"expected.{name}")

    def teaches(*, guess: bool) -> Teacher | None:
        return _teacher(recipe, factor, channels, teacher_context, guess=guess)

    found = read(lambda: teaches(guess=False), lambda: teaches(guess=True))
    return Shapes(factor, channels, context, teacher_context, found, missing)


def check(recipe: Recipe, arch: Architecture, given: Shapes, *, processes: int = 1) -> None:
    """Whether architecture, autoencoder, text encoders, teacher and stages fit together.

    Raises:
        InputError: naming the recipe and the place.
    """

    def refuse(place: str, problem: str, remedy: str) -> None:
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
            tiny_decoder_for(given, seed=0, **stage.decoder)
            continue
        size, rest = divmod(stage.resolution, given.factor)
        if rest or size % arch.stride:
            by = given.factor * arch.stride
            refuse(f"{place}.resolution", f"{stage.resolution} px do not fit the net", f"use a multiple of {by}")
        if stage.batch % (stage.accumulate * processes):
            problem = f"batch {stage.batch} does not fall into {processes} × {stage.accumulate} equal parts"
            refuse(f"{place}.batch", problem, "use a multiple, or another accumulate")
        if learns_from_teacher(stage) or (isinstance(stage, FlowStage) and stage.net == "teacher"):
            assert given.teacher is not None
            given.teacher.check(
                latent_channels=given.latent_channels,
                latent_size=size,
                context_width=given.teacher_context.context,
                pooled_width=given.teacher_context.pooled,
            )


def new_teacher(recipe: Recipe, factor: int, channels: int, widths: Widths, *, shape: Any = None) -> Teacher:
    """The recipe's own teacher, untrained; large enough for every stage.

    Raises:
        InputError: if there can be no such net.
    """
    assert recipe.teacher is not None
    shape = shape or recipe.teacher.shape
    largest = max(stage.resolution for stage in recipe.stages if isinstance(stage, Stage))
    return teacher.built(
        shape.model_dump(),
        latent_channels=channels,
        context_width=widths.context,
        pooled_width=widths.pooled,
        sample_size=largest // factor,
        seed=seeds.derive(recipe.seed, "teacher weights"),
        prediction=recipe.prediction,
        source=recipe.source,
    )


def _teacher(recipe: Recipe, factor: int, channels: int, widths: Widths, *, guess: bool) -> Teacher | None:
    if recipe.teacher is None:
        return None
    if recipe.teacher.path is not None and not guess:
        return teacher.shape_of(Path(recipe.teacher.path))
    shape = recipe.expected.teacher if guess and recipe.expected else recipe.teacher.shape
    if shape is None:
        return None
    with torch.device("meta"):
        return new_teacher(recipe, factor, channels, widths, shape=shape)
