"""Sets of one training image and one held-out image train, or end in one line that says what needs more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from archsearch.training import run as training
from archsearch.training.log import read_evaluations
from snapgen.errors import InputError
from tests.archsearch.studies.tiny_recipe import EVALUATION, STAGES, recipe


def small(folder: Path, train: int = 1, val: int = 1, **evaluation: Any) -> tuple[Any, Any]:
    """The recipe of all stages, on so many images of each split."""
    found, _ = recipe(folder)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            target = folder / "small" / split / "cat" / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "pictures" / "cat" / f"{number}.png", target)
    evaluation = {**EVALUATION, "retrieval": False, **evaluation}
    return found.with_changes({"data": str(folder / "small"), "evaluation": evaluation}), recipe(folder)[1]


def student_alone(found: Any, arch: Any) -> tuple[Any, Any]:
    return found.with_changes({"stages": [STAGES[1]], "teacher": None}), arch


def test_one_image_of_each_split_trains_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training.train(*small(tmp_path), log=lambda _: None)
    stages = {evaluation.stage for evaluation in read_evaluations(tmp_path / "runs" / "tiny")}
    assert stages == {stage["name"] for stage in STAGES}


@pytest.mark.parametrize(
    ("counts", "evaluation", "words"),
    [
        ({}, {"num_samples": 8, "feature_resolution": 32}, "has a single training image, where distances need two"),
        ({"train": 3}, {"num_samples": 8, "feature_resolution": 32, "retrieval": True}, "has 1 different captions"),
        ({"val": 0}, {}, "holds no images|falls in the val split"),
        ({"train": 0}, {}, "for training|holds no images"),
    ],
)
def test_too_few_for_a_score_are_refused_before_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], evaluation: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        training.train(*student_alone(*small(tmp_path, **counts, **evaluation)), log=lambda _: None)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*/stages/*"))


def test_two_training_images_have_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training.train(*student_alone(*small(tmp_path, train=2, num_samples=8, feature_resolution=32)), log=lambda _: None)
    last = read_evaluations(tmp_path / "runs" / "tiny")[-1]
    assert {"frechet_distance", "kernel_distance"} <= set(last.numbers)
