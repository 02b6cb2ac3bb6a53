from __future__ import annotations

from pathlib import Path

import pytest
import torch

from archsearch.stats.intervals import validation_estimate
from archsearch.training.log import TrainLog, read_evaluations
from archsearch.training.run_folder import RunFolder
from snapgen.training.loop import StepStats
from tests.archsearch.studies.tiny_recipe import recipe


def report(step: int, *, bad: list[int] | None = None) -> StepStats:
    losses = {"student loss": 1 / step}
    return StepStats(step, 4, 4 * step, losses, [1 / step], bad or [], lr_scale=1, images_per_second=10)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(*recipe(tmp_path))


def log(folder: RunFolder, told: list[str], *, main: bool = True) -> TrainLog:
    return TrainLog(folder, 1, folder.recipe.stages[1], told.append, main=main)


def test_rows_after_a_resume_are_not_doubled(folder: RunFolder) -> None:
    told: list[str] = []
    with log(folder, told) as first:
        first.start(0)
        for step in (1, 2, 3):
            first.log_stats(report(step))
    file = folder.path / "logs" / "02-base.csv"
    file.write_text(file.read_text() + "4,0.2")  # killed while it wrote
    file.write_text(file.read_text().replace("\n2,", "\nx,0.1,1,9\n2,"))
    with log(folder, told) as second:
        second.start(2)
        for step in (3, 4):
            second.log_stats(report(step))
    rows = file.read_text().splitlines()
    assert rows[0] == "step,student loss,rate,images/s"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert "02-base: resumes at step 2" in told


def test_a_stage_begun_anew_has_no_rows_of_before(folder: RunFolder) -> None:
    for _ in range(2):
        with log(folder, []) as found:
            found.start(0)
            found.log_stats(report(1))
    assert len((folder.path / "logs" / "02-base.csv").read_text().splitlines()) == 2


def test_an_evaluation_is_noted_once(folder: RunFolder) -> None:
    with log(folder, []) as found:
        found.start(0)
        for losses in (torch.ones(8), torch.full((8,), 2.0), torch.full((8,), 3.0)):
            numbers = {"validation_loss": validation_estimate([losses.double()])}
            found.log_evaluation(2 if losses[0] < 3 else 4, numbers, None)
    found_now = read_evaluations(folder.path)
    assert [(e.step, e.images, e.numbers["validation_loss"].value) for e in found_now] == [
        (2, 8, 2),
        (4, 16, 3),
    ]


def test_steps_that_were_left_out_are_told(folder: RunFolder) -> None:
    told: list[str] = []
    with log(folder, told) as found:
        found.start(0)
        found.log_stats(report(3, bad=[2]))
    assert any("skipped steps: 2" in line for line in told)


def test_other_processes_stay_silent(folder: RunFolder) -> None:
    told: list[str] = []
    with log(folder, told, main=False) as found:
        found.start(0)
        found.log_stats(report(1))
    assert told == []
    assert not folder.path.exists()
