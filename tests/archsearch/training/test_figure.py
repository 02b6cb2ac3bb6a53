"""The figure of a run: captions in columns, nets and their sampling in rows."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from archsearch.training import figure, run as training
from archsearch.training.evaluation import StageEvaluator
from archsearch.training.recipe import FigureConfig
from snapgen.errors import InputError
from tests.archsearch.studies.tiny_recipe import STAGES, recipe

ROWS = [{"stage": "base", "num_inference_steps": 2, "guidance_scale": 3}, {"stage": "base", "num_inference_steps": 1}]
CAPTIONS = ["an elephant that nobody has seen in any of the pictures", "red dot", "cat", "red dot"]
FIGURE = {"captions": CAPTIONS, "rows": ROWS}


def train(folder: Path, **changes: Any) -> list[str]:
    told: list[str] = []
    training.train(*recipe(folder, stages=[STAGES[1]], teacher=None, **changes), log=told.append)
    return [line for line in told if line.startswith("figure")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, before = tmp_path_factory.mktemp("drawn"), Path.cwd()
    os.chdir(folder)
    try:
        return folder, train(folder, figure=FIGURE)
    finally:
        os.chdir(before)


def test_each_row_shows_the_captions_trained_ones_first(drawn: tuple[Path, list[str]]) -> None:
    run = drawn[0] / "runs" / "tiny"
    with Image.open(run / "figure.png") as image:
        pitch, kinds = figure.PICTURE + figure.GAP, 2  # a trained caption and two others
        block = figure.HEADER + 2 * pitch + 2 * figure.GAP
        assert image.size == (figure.LABELS + 2 * pitch, kinds * block)
        pixels = np.asarray(image)
    for top in (figure.HEADER, block + figure.HEADER):
        first, second = (
            pixels[line : line + figure.PICTURE, figure.LABELS : figure.LABELS + figure.PICTURE]
            for line in (top, top + pitch)
        )
        assert (first != second).any(), "the rows are sampled in two ways"
    with (run / "figure.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["guidance"], row["evaluations"], row["captions"]) for row in rows] == [
        ("2", "3", "4", "3"),
        ("1", "1", "1", "3"),
    ]
    assert drawn[1] == ["figure: base, 2 steps, guidance 3: drawn", "figure: base, 1 step, unguided: drawn"]


def test_it_is_drawn_again_only_if_it_changes_or_is_gone(
    drawn: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drawn[0]
    monkeypatch.chdir(folder)
    assert train(folder, figure=FIGURE) == []
    assert len(train(folder, figure={"captions": ["cat"], "rows": ROWS[:1]})) == 1
    picture, table = folder / "runs" / "tiny" / "figure.png", folder / "runs" / "tiny" / "figure.csv"
    picture.write_bytes(b"half")
    assert len(train(folder, figure=FIGURE)) == 2
    picture.write_bytes(picture.read_bytes()[:-2000])
    assert len(train(folder, figure=FIGURE)) == 2
    table.unlink()
    assert len(train(folder, figure=FIGURE)) == 2
    table.write_text(table.read_text()[:-9])
    assert len(train(folder, figure=FIGURE)) == 2
    assert train(folder, figure=FIGURE) == []
    assert train(folder) == [], "without a figure"


def test_captions_count_as_trained_by_the_data_that_the_nets_see(tmp_path: Path) -> None:
    """Those who evaluate with other data compare nets on its held-out captions; its training captions are unseen."""

    def data(**captions: list[str]) -> SimpleNamespace:
        return SimpleNamespace(images=lambda split, _: SimpleNamespace(captions=captions[split]))

    stages = recipe(tmp_path, stages=[STAGES[1]], teacher=None)[0].stages
    evaluator = SimpleNamespace(
        recipe=SimpleNamespace(stages=stages),
        trained_on=data(train=["a cat"], val=["a dog"]),
        data=data(train=["a bird"], val=["a cow"]),
    )
    wanted = FigureConfig.model_validate({"captions": ["a cow", "a bird", "a cat"], "rows": ROWS})
    assert figure._kinds(wanted, cast(StageEvaluator, evaluator)) == {
        "captions of training images": ["a cat"],
        "held-out captions": ["a cow"],
        "other captions": ["a bird"],
    }


@pytest.mark.parametrize(("caption", "problem"), [(" ", "is empty"), ("red\napple", "has several lines")])
def test_a_caption_without_a_line_of_text(tmp_path: Path, caption: str, problem: str) -> None:
    with pytest.raises(InputError, match=rf"figure: captions\[1\] {problem}; write"):
        recipe(tmp_path, stages=[STAGES[1]], figure={**FIGURE, "captions": ["cat", caption]})


def test_a_row_of_no_student(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 'bass', which is no stage that trains the student; use one of: base"):
        recipe(tmp_path, stages=[STAGES[1]], figure={**FIGURE, "rows": [{**ROWS[0], "stage": "bass"}]})
