"""What a training tells: lines, a CSV a stage, TensorBoard, evaluations as JSON lines, sample grids."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from torch import Tensor

from archsearch.stats import intervals
from archsearch.stats.estimate import Estimate
from archsearch.training.evaluation import SamplingConfig
from archsearch.training.run_folder import RunFolder
from snapgen.io.atomic import atomic_write
from snapgen.training.loop import StepStats
from snapgen.training.stages import AnyStage, DecoderStage

SECONDS_BETWEEN_LINES = 5.0
EVALUATIONS = "evaluations.jsonl"


class TrainLog:
    """The log of one stage; after a resume it goes on where the checkpoint was, without what was told after that.

    Args:
        main: whether this process writes; the others stay silent.
    """

    def __init__(
        self, folder: RunFolder, number: int, stage: AnyStage, tell: Callable[[str], None], *, main: bool
    ) -> None:
        self._folder, self._stage, self._tell, self._main = folder, stage, tell, main
        self._label = folder.label(number)
        self._csv = folder.path / "logs" / f"{self._label}.csv"
        self._board: Any = None
        self._told = 0.0
        self._began, self._from = time.monotonic(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def begin(self, step: int) -> None:
        """From so many steps on."""
        self._began, self._from = time.monotonic(), step
        if not self._main:
            return
        from torch.utils.tensorboard import SummaryWriter

        where = self._folder.path / "tensorboard" / self._label
        self._board = SummaryWriter(str(where), purge_step=step + 1)
        self._csv.parent.mkdir(parents=True, exist_ok=True)
        if self._csv.exists():
            with self._csv.open(newline="") as file:
                rows = list(csv.reader(file))
            # The last one may have been cut short.
            kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= step]
            self._write([rows[0], *kept] if step and kept else [])
        self._tell(f"{self._label}: from step {step:,}" if step else f"{self._label}: begins")

    def report(self, report: StepStats) -> None:
        """What the loop did since its last report."""
        if not self._main:
            return
        self.row(report.step, {**report.losses, "rate": report.rate, "images/s": report.images_per_second})
        if report.bad:
            skipped = ", ".join(map(str, report.bad[:5]))
            self._tell(f"{self._label}: a gradient was not finite, steps left out: {skipped}")
        now = time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES and report.step < report.steps:
            return
        self._told = now
        left = (now - self._began) / max(1, report.step - self._from) * (report.steps - report.step)
        shown = ", ".join(f"{name.removeprefix('student ')} {value:.4g}" for name, value in report.losses.items())
        total = report.steps * report.images // max(1, report.step)
        self._tell(
            f"{self._label}: {report.images:,} of {total:,} images, {shown}, "
            f"{report.images_per_second:.0f} images/s, {_time(left)} left"
        )

    def decoder_row(self, step: int, steps: int, losses: Mapping[str, float], *, seconds: float) -> None:
        """What a decoder's training did since its last report."""
        self.row(step, {"mse": losses["mse"], "perceptual": losses["perceptual"], "seconds": seconds})
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES or step == steps:
            self._told = now
            left = (now - self._began) / max(1, step - self._from) * (steps - step)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            self._tell(f"{self._label}: step {step:,} of {steps:,}, {shown}, {_time(left)} left")

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row of numbers, to CSV and TensorBoard."""
        fresh = not self._csv.exists() or not self._csv.stat().st_size
        with self._csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", *numbers])
            writer.writerow([step, *(f"{value:.6g}" for value in numbers.values())])
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def validated(self, step: int, losses: Tensor) -> None:
        """An evaluation on the way."""
        self._evaluation(step, {"validation_loss": intervals.validation_estimate([losses])}, None)

    def measured(self, step: int, numbers: Mapping[str, Estimate], sampler: SamplingConfig) -> None:
        """The evaluation at the stage's end."""
        self._evaluation(step, numbers, sampler)

    def _evaluation(self, step: int, numbers: Mapping[str, Estimate], sampler: SamplingConfig | None) -> None:
        entry = {
            "stage": self._stage.name,
            "step": step,
            "images": 0 if isinstance(self._stage, DecoderStage) else step * self._stage.batch,
            "sampler": None if sampler is None else vars(sampler),
            "numbers": {name: number.model_dump(mode="json") for name, number in numbers.items()},
        }
        path = self._folder.path / EVALUATIONS
        others = [e for e in read_evaluations(self._folder.path) if (e["stage"], e["step"]) != (entry["stage"], step)]
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(e) + "\n" for e in [*others, entry]))
        for name, number in numbers.items():
            self._board.add_scalar(name, number.value, step)
        shown = ", ".join(f"{name} {n.value:.4g} [{n.low:.4g}, {n.high:.4g}]" for name, n in numbers.items())
        self._tell(f"{self._label}: step {step:,}: {shown}")

    def grid(self, step: int, sheet: Tensor, sampler: SamplingConfig) -> None:
        """A grid of samples, (3, H, W) uint8."""
        path = self._folder.path / "samples" / f"{self._label}-{step:07d}-{sampler.steps}-steps.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(part, format="png")
        self._board.add_image(f"samples, {sampler.steps} steps", sheet, step)

    def _write(self, rows: list[list[str]]) -> None:
        with atomic_write(self._csv) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run so far, in the order in which they were made."""
    path = run / EVALUATIONS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
