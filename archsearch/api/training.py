"""Train a recipe, and see what it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from archsearch.api.architecture import find_architecture
from archsearch.reports.rendering.tables import quality_columns
from archsearch.training import run
from archsearch.training.log import Evaluation, read_evaluations
from archsearch.training.recipe import Recipe, load_recipe
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.pipeline.loading import load_pipeline
from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline


@dataclass(frozen=True)
class TrainedRun:
    """A training's run, whole or so far.

    Attributes:
        folder: where its stages' results, checkpoints, logs and samples are.
        recipe: that it was trained by.
        architecture: of its student.
    """

    folder: Path
    recipe: Recipe
    architecture: Architecture

    def pipeline(self) -> SnapGenPipeline:
        """Load the pipeline of the last student, on the CPU; ``pipeline()("a red apple").images[0]`` draws.

        Raises:
            InputError: if there is none yet, or its files are damaged.
        """
        return load_pipeline(self.folder)

    def evaluations(self) -> pandas.DataFrame:
        """Every evaluation so far, a row each: stage, step, images, how samples were drawn, and each number with its
        95 % interval (``validation_loss``, ``validation_loss_low``, ``validation_loss_high``).
        """
        return pandas.DataFrame([_columns(evaluation) for evaluation in read_evaluations(self.folder)])

    def __repr__(self) -> str:
        stages = ", ".join(stage.name for stage in self.recipe.stages)
        return f"<TrainedRun {self.recipe.name}: stages {stages}; in {self.folder}>"


def train(
    recipe: str | Path | Recipe,
    architecture: Architecture | str | Path | None = None,
    *,
    name: str | None = None,
    seed: int | None = None,
    stop_after: str | None = None,
    log: Callable[[str], None] | None = print,
) -> TrainedRun:
    """Train an architecture by a recipe, or resume the run of that name; the same call resumes a killed one.

    Args:
        recipe: a shipped recipe's name, a YAML file, or the recipe itself.
        architecture: of the student, if not the recipe's: a description or a name, as
            `archsearch.api.architecture.find_architecture` takes it.
        name: of the run, if not the recipe's; its folder is ``runs/NAME``.
        seed: of everything random, if not the recipe's.
        stop_after: the stage to stop after; None: the last.
        log: takes a line of progress; None: silence.

    Raises:
        InputError: if something that the recipe names is missing or does not fit, if the run was begun with another
            recipe, or if another process trains it.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    changes: dict[str, Any] = {"name": name, "seed": seed}
    if architecture is not None:
        changes["architecture"] = architecture.id if isinstance(architecture, Architecture) else str(architecture)
    chosen = chosen.with_changes({key: value for key, value in changes.items() if value is not None})
    student = find_architecture(chosen.architecture if architecture is None else architecture)
    stages = [stage.name for stage in chosen.stages]
    if stop_after is not None and stop_after not in stages:
        raise InputError("stop_after", f"{stop_after!r:.60} is not a stage", f"use one of: {', '.join(stages)}")
    folder = run.train(chosen, student, log=log or (lambda _: None), stop_after=stop_after)
    return TrainedRun(folder, chosen, student)


def _columns(evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation, as the run's file has it, by the names of its columns."""
    row: dict[str, Any] = evaluation.model_dump(include={"stage", "step", "images"})
    row |= {f"sampler_{key}": value for key, value in (evaluation.sampling or {}).items()}
    for metric, estimate in evaluation.numbers.items():
        row |= quality_columns(metric, estimate)
    return row
