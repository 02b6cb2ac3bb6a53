"""The folder of a run: what is in it, and whether it is of the recipe at hand."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from archsearch.training.recipe import Recipe
from snapgen import config as settings
from snapgen.architecture.schema import Architecture
from snapgen.diffusion.process import PredictionType
from snapgen.errors import InputError, first_line
from snapgen.io import checkpoint, prediction_note
from snapgen.io.atomic import atomic_folder, atomic_write
from snapgen.models.unet import UNet
from snapgen.progress import silence_libraries
from snapgen.training.stages import AnyStage

MADE_OF = "stages.txt"
"""In the pipeline's folder: which stages' results it holds."""
MAY_CHANGE = ("checkpoint_minutes", "evaluation")
"""Fields of a recipe that change no weights."""
MAY_CHANGE_IN_STAGE = ("on_bad", "evaluate_every", "compile", "gradient_checkpointing", "accumulate")
"""Fields of a stage likewise, but for rounding."""


class RunFolder:
    """Where a recipe's run lies.

    Args:
        arch: the student's.
    """

    def __init__(self, recipe: Recipe, arch: Architecture) -> None:
        self.recipe, self.arch = recipe, arch
        self.path = recipe.folder
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.pipeline = self.path / "pipeline"

    def result(self, number: int) -> Path:
        """What a stage leaves when it is done."""
        return self.path / "stages" / self.label(number)

    def label(self, number: int) -> str:
        """A stage's place and name."""
        return f"{number + 1:02d}-{self.recipe.stages[number].name}"

    def before(self, number: int, kind: Callable[[AnyStage], bool]) -> Path | None:
        """The result of the last stage of a kind before one."""
        stages = self.recipe.stages[:number]
        found = next((i for i in reversed(range(number)) if kind(stages[i])), None)
        return None if found is None else self.result(found)

    def prepared(self) -> Path:
        """The folder itself, made if it was not there.

        Raises:
            InputError: if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = (error.strerror or "cannot be written").lower()
            raise InputError(self.path, problem, "train in another folder, or with another --name") from None
        return self.path

    def begin(self) -> None:
        """Note what is trained, or check that it is what was begun.

        Raises:
            InputError: naming the first field that differs, in a stage that was begun or in what all stages share.
        """
        notes = {
            "recipe.json": self.recipe.model_dump(mode="json"),
            "architecture.json": self.arch.model_dump(mode="json"),
        }
        kept = {name: self.path / name for name in notes}
        if kept["recipe.json"].exists():
            before = settings.load_yaml(kept["recipe.json"], Recipe)
            self._compare(before)
            if kept["architecture.json"].exists():
                known = Architecture.load(kept["architecture.json"])
                if known.id != self.arch.id:
                    problem = f"was begun with architecture {known.id}, not {self.arch.id}"
                    raise InputError(self.path, problem, "give the first, or another --name")
        for name, values in notes.items():
            with atomic_write(kept[name]) as part:
                part.write_text(json.dumps(values, indent=2) + "\n")

    def _compare(self, before: Recipe) -> None:
        ours, theirs = (recipe.model_dump(mode="json") for recipe in (self.recipe, before))
        for field in ours:
            if field not in (*MAY_CHANGE, "stages", "name") and ours[field] != theirs[field]:
                self._refuse(field, theirs[field], ours[field])
        begun = sum(self.path.joinpath("stages", f"{i + 1:02d}-{s.name}").is_dir() for i, s in enumerate(before.stages))
        if self.checkpoint.exists():
            begun += checkpoint.read_metadata(self.checkpoint)["stage"] in [
                stage.name for stage in before.stages[begun:]
            ]
        for i, (mine, other) in enumerate(zip(ours["stages"], theirs["stages"][:begun], strict=False)):
            for field in sorted({*mine, *other}):
                if field not in MAY_CHANGE_IN_STAGE and mine.get(field) != other.get(field):
                    self._refuse(f"stages[{i}].{field}", other.get(field), mine.get(field))
        if len(ours["stages"]) < begun:
            self._refuse("stages", f"{len(theirs['stages'])} stages", f"{len(ours['stages'])}")

    def _refuse(self, place: str, before: object, now: object) -> None:
        problem = f"this run was begun with {_short(before)}, not {_short(now)}"
        raise InputError(
            self.recipe.source, problem, f"restore it, or give another --name than {self.path.name}", place=place
        )

    def pipeline_made_of(self) -> str | None:
        """The stages whose results the pipeline holds; None if there is no whole one."""
        note = self.pipeline / MADE_OF
        return note.read_text().strip() if note.is_file() else None

    def write_pipeline(self, write: Callable[[Path], object], made_of: str) -> None:
        """Write the pipeline aside and put it in the place of the one that is there.

        Raises:
            InputError: if it cannot be written; the one that was there is left as it is.
        """
        old, new = (self.path / f".{self.pipeline.name}.{age}" for age in ("old", "new"))
        for left in (old, new):
            shutil.rmtree(left, ignore_errors=True)
        with self._told(self.pipeline), silence_libraries():
            write(new)
            (new / MADE_OF).write_text(made_of + "\n")
            if self.pipeline.exists():
                self.pipeline.rename(old)
            new.rename(self.pipeline)
        shutil.rmtree(old, ignore_errors=True)

    def finish(self, number: int, write: Callable[[Path], object]) -> None:
        """Write a stage's result, whole or not at all; its checkpoint is of no more use then.

        Raises:
            InputError: if it cannot be written; the checkpoint is left.
        """
        result = self.result(number)
        for left in result.parent.glob(f".{result.name}-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        (self.pipeline / MADE_OF).unlink(missing_ok=True)  # a pipeline of an earlier result is to be made again
        with self._told(result), silence_libraries(), atomic_folder(result) as folder:
            write(folder)
        self.checkpoint.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """A folder that cannot be written is told in one line; nothing half-written is left."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path.with_name(f".{path.name}.new"), ignore_errors=True)
            problem = f"cannot be written ({first_line(error)})"
            raise InputError(path, problem, "make room; the same command goes on from the last checkpoint") from None

    @contextlib.contextmanager
    def fitting_checkpoint(self) -> Iterator[None]:
        """Where a checkpoint is loaded that may be whole and yet another training's.

        Raises:
            InputError: then.
        """
        try:
            yield
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            problem = f"does not fit its stage ({first_line(error)})"
            raise InputError(self.checkpoint, problem, "remove it to begin the stage again") from None

    def read_checkpoint(self, number: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
        """The checkpoint, if there is one of this stage."""
        if not self.checkpoint.exists():
            return {}, None
        parts, facts = checkpoint.load_checkpoint(self.checkpoint)
        return (parts, facts) if facts.get("stage") == self.recipe.stages[number].name else ({}, None)


def read_unet(folder: Path | str | None, arch: Architecture) -> UNet | None:
    """A U-Net from its folder, checked against an architecture; None without a folder.

    Raises:
        InputError: if it is missing, damaged, or of another architecture.
    """
    if folder is None:
        return None
    path = Path(folder)
    check_unet(path, arch)
    try:
        with silence_libraries():
            unet: UNet = UNet.from_pretrained(path, use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise kinds of their own for a damaged file
        problem = f"cannot be read ({first_line(error)})"
        raise InputError(path, problem, "restore it, or remove its folder to train the stage again") from None
    return unet


def write_unet(unet: UNet, prediction: PredictionType, folder: Path) -> None:
    """Write a U-Net and, beside it, what it predicts."""
    unet.save_pretrained(folder)
    prediction_note.write_prediction_type(folder, prediction)


def check_prediction(path: Path, prediction: PredictionType) -> None:
    """Whether the U-Net in a folder predicts what is wanted, by the note beside it.

    Raises:
        InputError: if it predicts something else, nothing says what, or the note is damaged.
    """
    own = prediction_note.read_prediction_type(path)
    if own is None:
        remedy = f'if it is what it was trained for, write {{"prediction": "{prediction}"}} there'
        raise InputError(path / prediction_note.NOTE, "is missing, so nothing says what the U-Net predicts", remedy)
    if own != prediction:
        problem = f"predicts {own!r}, and is to teach a net that predicts {prediction!r}"
        raise InputError(path, problem, "name a teacher that was trained for the same prediction")


def unet_arch(path: Path) -> Architecture:
    """The architecture of the U-Net in a folder.

    Raises:
        InputError: if it is missing or damaged.
    """
    config = settings.read_mapping(path / "config.json")
    try:
        return Architecture.model_validate(config["arch"])
    except (KeyError, ValueError):
        raise InputError(path / "config.json", "describes no U-Net of ours", "name a U-Net's folder") from None


def check_unet(path: Path, arch: Architecture) -> None:
    """Whether a folder holds a U-Net of an architecture, by its configuration.

    Raises:
        InputError: if it is missing, damaged, or of another architecture.
    """
    own = unet_arch(path)
    if own.id != arch.id:
        problem = f"is of architecture {own.id}, not {arch.id}"
        raise InputError(path, problem, "give both the same, or leave weights out")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
