"""Folder of a run: its files, and the check that it belongs to the recipe at hand."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
from torch import Tensor

from archsearch.training.recipe import Recipe
from snapgen import config as settings, files
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError, first_line, os_errors
from snapgen.io import checkpoint
from snapgen.io.atomic import atomic_folder, atomic_write
from snapgen.io.digests import CHECKSUMS, check_checksums, write_checksums
from snapgen.io.pretrained import open_weights
from snapgen.models.unet import UNet, load_unet
from snapgen.progress import silence_libraries
from snapgen.training.stages import AnyStage

T = TypeVar("T")

STAGES_FILE = "stages.txt"
"""File in the pipeline's folder that lists the stages whose results it contains."""
MAY_CHANGE = ("checkpoint_minutes", "evaluation", "figure", "log_with")
"""Fields of a recipe that may change between runs, because they do not affect the weights."""
MAY_CHANGE_IN_STAGE = (
    "on_nonfinite_grad",
    "evaluate_every",
    "compile",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
)
"""Fields of a stage that may change between runs, because they affect the weights by rounding at most."""


class RunFolder:
    """Folder of a recipe's run.

    Args:
        recipe: the recipe.
        arch: architecture of the student.
    """

    def __init__(self, recipe: Recipe, arch: Architecture) -> None:
        self.recipe, self.arch = recipe, arch
        self.path = recipe.folder
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.best_weights = self.path / "best.safetensors"
        self.pipeline = self.path / "pipeline"
        self.figure = self.path / "figure.png"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the folder, so that no other launch trains the same run.

        Raises:
            InputError: if another launch holds the lock.
        """
        lock = filelock.FileLock(self.create() / ".lock")
        with os_errors(lock.lock_file, "move it away"):
            try:
                held = lock.acquire(blocking=False)
            except filelock.Timeout:
                problem = "is being trained by another process"
                raise InputError(self.path, problem, "wait for it, or name another run (--name)") from None
        with held:
            yield

    def result(self, number: int) -> Path:
        """Folder of a finished stage's result."""
        return self.path / "stages" / self.label(number)

    def label(self, number: int) -> str:
        """Number and name of a stage, e.g. ``01-base``."""
        return f"{number + 1:02d}-{self.recipe.stages[number].name}"

    def previous_result(self, number: int, kind: Callable[[AnyStage], bool]) -> Path | None:
        """Result of the last stage before ``number`` for which ``kind`` holds; None without one."""
        stages = self.recipe.stages[:number]
        previous = next((i for i in reversed(range(number)) if kind(stages[i])), None)
        return None if previous is None else self.result(previous)

    def create(self) -> Path:
        """Create the folder if it does not exist, and return it.

        Raises:
            InputError: if it cannot be created.
        """
        with os_errors(self.path, "train in another folder, or with another --name"):
            self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def record_recipe(self, contents: dict[str, str]) -> None:
        """Write what is trained into the folder, after checking it against what an earlier run wrote.

        Args:
            contents: digests of what the recipe names by a path (`archsearch.training.compatibility.contents_of`).

        Raises:
            InputError: if a field of a started stage, or one shared by all stages, or the contents of a file or folder
                differ; it names the first.
        """
        notes = {
            "recipe.json": self.recipe.model_dump(mode="json"),
            "architecture.json": self.arch.model_dump(mode="json"),
            "contents.json": contents,
        }
        stored = self._recorded("recipe.json", lambda path: settings.load_yaml(path, Recipe))
        if stored is not None:
            self._check_unchanged(stored)
        stored_arch = self._recorded("architecture.json", Architecture.load)
        if stored_arch is not None and stored_arch.id != self.arch.id:
            problem = f"was begun with architecture {stored_arch.id}, not {self.arch.id}"
            raise InputError(self.path, problem, "give that architecture, or another --name")
        self._check_contents(self._recorded("contents.json", settings.read_mapping) or {}, contents)
        for name, values in notes.items():
            with atomic_write(self.path / name) as file:
                file.write_text(json.dumps(values, indent=2) + "\n")

    def _recorded(self, name: str, read: Callable[[Path], T]) -> T | None:
        """A file that an earlier run wrote into the folder, read; None without one.

        Raises:
            InputError: if it is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        with _with_remedy(f"restore it, or give another --name than {self.path.name}"):
            return read(path)

    def _check_unchanged(self, stored: Recipe) -> None:
        new, old = (recipe.model_dump(mode="json") for recipe in (self.recipe, stored))
        for field in new:
            if field not in (*MAY_CHANGE, "stages", "name") and new[field] != old[field]:
                self._reject(field, old[field], new[field])
        unfinished = checkpoint.read_metadata(self.checkpoint)["stage"] if self.checkpoint.exists() else None
        started = max(  # a result that was taken away is trained again, with what was begun after it kept
            (
                number
                for number, stage in enumerate(stored.stages, 1)
                if stage.name == unfinished or self.path.joinpath("stages", f"{number:02d}-{stage.name}").is_dir()
            ),
            default=0,
        )
        for i, (new_stage, old_stage) in enumerate(zip(new["stages"], old["stages"][:started], strict=False)):
            for field in sorted({*new_stage, *old_stage}):
                if field not in MAY_CHANGE_IN_STAGE and new_stage.get(field) != old_stage.get(field):
                    self._reject(f"stages[{i}].{field}", old_stage.get(field), new_stage.get(field))
        if len(new["stages"]) < started:
            self._reject("stages", f"{len(old['stages'])} stages", f"{len(new['stages'])} stages")

    def _check_contents(self, stored: dict[str, Any], contents: dict[str, str]) -> None:
        for place, digest in contents.items():
            if stored.get(place, digest) != digest:
                problem = "has other contents than when this run was begun"
                remedy = f"restore them, or give another --name than {self.path.name}"
                raise InputError(self.recipe.source, problem, remedy, place=place)

    def _reject(self, place: str, before: object, now: object) -> None:
        old, new = (settings.as_yaml(value, max_length=60) for value in (before, now))
        problem = f"this run was begun with {old}, not {new}"
        raise InputError(
            self.recipe.source, problem, f"restore it, or give another --name than {self.path.name}", place=place
        )

    def pipeline_stages(self) -> str | None:
        """Labels of the stages whose results the pipeline contains; None if there is no complete pipeline."""
        stages_file = self.pipeline / STAGES_FILE
        remedy = f"remove {self.pipeline}: the same command writes it again"
        return files.read_text(stages_file, remedy).strip() if stages_file.is_file() else None

    def check_results(self) -> None:
        """Check the results of the finished stages against the checksums that were written with them.

        Raises:
            InputError: if a file is missing, damaged or changed; it names the file, and how to go on.
        """
        for result in (path for path in map(self.result, range(len(self.recipe.stages))) if path.exists()):
            if not result.is_dir():
                raise InputError(result, "is not the folder of a stage's result", "move it away")
            remedy = f"restore it, or remove {result} to train the stage again"
            check_checksums(result, remedy)
            if not (result / CHECKSUMS).is_file():  # a result of before there were any
                with _with_remedy(remedy):
                    open_weights(result)

    def check_pipeline(self) -> None:
        """Check the pipeline against its checksums; see `check_results`."""
        check_checksums(self.pipeline, f"restore it, or remove {self.pipeline}: the same command writes it again")

    def write_pipeline(self, write: Callable[[Path], object], stages: str) -> None:
        """Write the pipeline to a temporary folder and replace the existing one.

        Args:
            write: writes the pipeline into the folder it is given.
            stages: labels of the stages whose results it contains.

        Raises:
            InputError: if it cannot be written; the existing pipeline is left unchanged.
        """
        with _whole_folder(self.pipeline, replace=True) as folder:
            write(folder)
            (folder / STAGES_FILE).write_text(stages + "\n")

    def write_result(self, number: int, write: Callable[[Path], object]) -> None:
        """Write a stage's result atomically and delete its checkpoint.

        Raises:
            InputError: if it cannot be written; the checkpoint is kept.
        """
        (self.pipeline / STAGES_FILE).unlink(missing_ok=True)  # a pipeline of an earlier result must be rebuilt
        self.figure.unlink(missing_ok=True)
        with _whole_folder(self.result(number)) as folder:
            write(folder)
        self.checkpoint.unlink(missing_ok=True)
        self.best_weights.unlink(missing_ok=True)

    @contextlib.contextmanager
    def checkpoint_errors(self) -> Iterator[None]:
        """Convert errors in the block, which loads a checkpoint that may be of another training.

        Raises:
            InputError: if the checkpoint does not fit its stage.
        """
        try:
            yield
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            problem = f"does not fit its stage ({first_line(error)})"
            raise InputError(self.checkpoint, problem, "remove it to restart the stage") from None

    def read_checkpoint(self, number: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
        """Tensors and metadata of the checkpoint; ({}, None) if there is none of this stage."""
        if not self.checkpoint.exists():
            return {}, None
        tensors, metadata = checkpoint.load_checkpoint(self.checkpoint)
        return (tensors, metadata) if metadata.get("stage") == self.recipe.stages[number].name else ({}, None)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Convert a full disk, and a file of the run that cannot be written, into an `InputError` with a remedy."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename  # of a file that replaces another, the other
        if path and Path(path).is_relative_to(folder):
            reason = (error.strerror or "cannot be written").lower()
            raise InputError(path, reason, "move it away; the same command resumes") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free disk space; the same command resumes from the last checkpoint"
        raise InputError(folder, "cannot be written (no space left on device)", remedy) from None


@contextlib.contextmanager
def _whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder of the run that is written aside; what a killed process left of it is deleted first."""
    for place in (path.parent, path):
        if place.exists() and not place.is_dir():
            raise InputError(place, "is not a folder", "move it away; the same command resumes")
    for leftover in path.parent.glob(f".{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    remedy = "free disk space; the same command resumes from the last checkpoint"
    with silence_libraries(), atomic_folder(path, replace=replace, remedy=remedy) as folder:
        yield folder
        write_checksums(folder)


def read_unet(folder: Path | str | None, arch: Architecture) -> UNet | None:
    """Load a U-Net from its folder and check its architecture; None without a folder.

    Raises:
        InputError: if it is missing, damaged, or of another architecture.
    """
    if folder is None:
        return None
    check_unet(Path(folder), arch)
    with _with_remedy("restore it, or remove its folder to train the stage again"):
        return load_unet(Path(folder))


@contextlib.contextmanager
def _with_remedy(remedy: str) -> Iterator[None]:
    """Replace the remedy of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(error.source, error.problem, remedy, place=error.place) from None


def unet_arch(path: Path) -> Architecture:
    """Read the architecture of the U-Net in a folder.

    Raises:
        InputError: if it is missing or damaged.
    """
    if not (path / "config.json").is_file():
        problem = "is not a U-Net's folder: it has no config.json" if path.exists() else "does not exist"
        raise InputError(path, problem, "name a U-Net's folder, e.g. runs/NAME/stages/01-base")
    config = settings.read_mapping(path / "config.json")
    try:
        return Architecture.model_validate(config["arch"])
    except (KeyError, ValueError):
        raise InputError(
            path / "config.json", "does not describe a U-Net of this package", "name a U-Net's folder"
        ) from None


def check_unet(path: Path, arch: Architecture) -> None:
    """Check that a folder contains a U-Net of an architecture, by its configuration.

    Raises:
        InputError: if it is missing, damaged, or of another architecture.
    """
    own = unet_arch(path)
    if own.id != arch.id:
        problem = f"has architecture {own.id}, not {arch.id}"
        raise InputError(path, problem, "give both the same architecture, or leave init_weights out")
