"""Log of a training run: lines, a CSV per stage, trackers, evaluations as JSON lines, and sample grids."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from torch import Tensor

from archsearch.quality.evaluator import SamplingConfig
from archsearch.stats.estimate import Estimate
from archsearch.training.run_folder import RunFolder
from snapgen import files
from snapgen.config import Config, json_lines, parse_config
from snapgen.io.atomic import atomic_write
from snapgen.progress import format_duration
from snapgen.training.loop import StepStats
from snapgen.training.stages import AnyStage, DecoderStage
from snapgen.training.trackers import Trackers

SECONDS_BETWEEN_LINES = 5.0
EVALUATIONS = "evaluations.jsonl"


class Evaluation(Config):
    """A line of a run's evaluations."""

    stage: str
    """Name of the evaluated stage."""
    step: int
    """Training step after which the net was evaluated."""
    images: int
    """Training images until then; 0 for a decoder."""
    sampling: dict[str, Any] | None
    """How samples were drawn; None: none were."""
    numbers: dict[str, Estimate]
    """What was measured, by name."""


class TrainLog:
    """Log of one stage. After a resume it continues at the checkpoint; rows logged after the checkpoint are removed.

    Args:
        folder: folder of the run.
        number: index of the stage in the recipe.
        stage: the stage.
        log: called with each line for the user.
        main: whether this process writes; other processes stay silent.
    """

    def __init__(
        self, folder: RunFolder, number: int, stage: AnyStage, log: Callable[[str], None], *, main: bool
    ) -> None:
        self._folder, self._stage, self._log, self._main = folder, stage, log, main
        self._label = folder.label(number)
        self._csv = folder.path / "logs" / f"{self._label}.csv"
        self._trackers: Trackers | None = None
        self._logged_at = 0.0
        self._started_at, self._first_step = time.monotonic(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers is not None:
            self._trackers.finish()

    def start(self, step: int) -> None:
        """Open the log after ``step`` finished steps (0: from the beginning)."""
        self._started_at, self._first_step = time.monotonic(), step
        if not self._main:
            return
        recipe = self._folder.recipe
        self._trackers = Trackers(
            recipe.log_with, project=recipe.name, run=self._label, folder=self._folder.path, step=step
        )
        self._csv.parent.mkdir(parents=True, exist_ok=True)
        read_evaluations(self._folder.path)  # so that a damaged line is told before the stage is trained
        if self._csv.exists():
            with self._csv.open(newline="", errors="replace") as file:
                rows = list(csv.reader(file))
            # The last row may have been cut short by a kill.
            whole = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdecimal()]
            retained = [row for row in whole if int(row[0]) <= step]
            self._write([rows[0], *retained] if step and retained else [])
        self._log(f"{self._label}: resumes at step {step:,}" if step else f"{self._label}: starts")

    def log_stats(self, stats: StepStats) -> None:
        """Log the loop's statistics since its last report."""
        if not self._main:
            return
        self.write_row(stats.step, {**stats.losses, "rate": stats.lr_scale, "images/s": stats.images_per_second})
        if stats.skipped:
            skipped = ", ".join(map(str, stats.skipped[:5]))
            self._log(f"{self._label}: a gradient was not finite, skipped steps: {skipped}")
        now = time.monotonic()
        if now - self._logged_at < SECONDS_BETWEEN_LINES and stats.step < stats.steps:
            return
        self._logged_at = now
        left = (now - self._started_at) / max(1, stats.step - self._first_step) * (stats.steps - stats.step)
        shown = ", ".join(f"{name.removeprefix('student ')} {value:.4g}" for name, value in stats.losses.items())
        total = stats.steps * stats.images // max(1, stats.step)
        self._log(
            f"{self._label}: {stats.images:,} of {total:,} images, {shown}, "
            f"{stats.images_per_second:.0f} images/s, {format_duration(left)} left"
        )

    def log_decoder_stats(self, step: int, steps: int, losses: Mapping[str, float], *, seconds: float) -> None:
        """Log the mean losses of a decoder's training since the last call, which took ``seconds``."""
        self.write_row(step, {"mse": losses["mse"], "perceptual": losses["perceptual"], "seconds": seconds})
        now = time.monotonic()
        if now - self._logged_at >= SECONDS_BETWEEN_LINES or step == steps:
            self._logged_at = now
            left = (now - self._started_at) / max(1, step - self._first_step) * (steps - step)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            self._log(f"{self._label}: step {step:,} of {steps:,}, {shown}, {format_duration(left)} left")

    def write_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a row of numbers to the CSV and to the trackers."""
        is_new = not self._csv.exists() or not self._csv.stat().st_size
        with self._csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", *numbers])
            writer.writerow([step, *(f"{value:.6g}" for value in numbers.values())])
        if self._trackers is not None:
            self._trackers.log(numbers, step)

    def log_evaluation(self, step: int, numbers: Mapping[str, Estimate], sampler: SamplingConfig | None) -> None:
        """Log an evaluation after a step, as the last of the stage; an earlier one after the same step is removed."""
        entry = Evaluation(
            stage=self._stage.name,
            step=step,
            images=0 if isinstance(self._stage, DecoderStage) else step * self._stage.batch_size,
            sampling=None if sampler is None else vars(sampler),
            numbers=dict(numbers),
        )
        path = self._folder.path / EVALUATIONS
        earlier = [e for e in read_evaluations(self._folder.path) if (e.stage, e.step) != (entry.stage, step)]
        with atomic_write(path) as file:
            file.write_text("".join(e.model_dump_json() + "\n" for e in [*earlier, entry]))
        if self._trackers is not None:
            self._trackers.log({name: number.value for name, number in numbers.items()}, step)
        shown = ", ".join(f"{name} {number:.4g}" for name, number in numbers.items())
        self._log(f"{self._label}: step {step:,}: {shown}")

    def log_image(self, step: int, image: Tensor, name: str) -> None:
        """Write a grid of images, (3, H, W) uint8, as PNG and to the trackers."""
        path = self._folder.path / "samples" / f"{self._label}-{step:07d}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png")  # CHW -> HWC
        if self._trackers is not None:
            self._trackers.log_image(f"samples, {name}", image, step)

    def _write(self, rows: list[list[str]]) -> None:
        with atomic_write(self._csv) as path, path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def read_evaluations(run: Path) -> list[Evaluation]:
    """All evaluations of a run so far, in order.

    Raises:
        InputError: naming a line that is damaged.
    """
    path = run / EVALUATIONS
    lines = json_lines(files.read_text(path), path) if path.exists() else ()
    return [parse_config(values, Evaluation, source=path, place=place) for place, values in lines]
