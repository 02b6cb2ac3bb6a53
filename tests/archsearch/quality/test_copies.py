from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from archsearch.protocol import EvaluationConfig
from archsearch.quality.distances import COPY_QUANTILE, nearest
from archsearch.quality.evaluator import SAMPLE_GRID, Evaluator
from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.data.pixels import GRID_GAP
from snapgen.training.data import TrainingData

CPU = torch.device("cpu")
SIDE = 32
ENCODERS = (TextEncoderConfig(tokens=4),)


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """An evaluator of 60 training and 40 held-out images of blocks of color, in pixel space."""
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 40)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for number in range(count):
            blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(tmp_path / "images" / split / f"{number}.png")
    data = TrainingData(str(tmp_path / "images"), "none", ENCODERS, device=CPU)
    config = EvaluationConfig(num_samples=8, validation_pairs=8, feature_resolution=32)
    return Evaluator(data, SIDE, config)


def pictures(evaluator: Evaluator, split: str) -> Tensor:
    return evaluator.data.images(split, SIDE).pixels  # type: ignore[arg-type]


def test_nearest_images_by_distance() -> None:
    found = nearest(torch.tensor([[0.0, 1.0], [5.0, 5.0]]), torch.tensor([[5.0, 2.0], [0.0, 0.0], [9.0, 9.0]]))
    assert found.indices.tolist() == [1, 0]
    assert found.distances.tolist() == [1, 3]


def test_copies_are_counted(evaluator: Evaluator) -> None:
    check = evaluator.memorization
    train, heldout = pictures(evaluator, "train"), pictures(evaluator, "val")
    assert check.copied(evaluator.features(train)).value == 1
    real = check.copied(evaluator.features(heldout))
    assert real.value == pytest.approx(COPY_QUANTILE)
    assert real.low < COPY_QUANTILE < real.high < 0.25
    mixed = torch.cat([train[:10], heldout[:10]])
    assert 0.5 <= check.copied(evaluator.features(mixed)).value <= 0.6


def test_copies_are_of_what_the_net_was_trained_on(evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "other" / "train").mkdir(parents=True)
    held = tmp_path / "images" / "val"
    for number in range(20):
        (held / f"{number}.png").rename(tmp_path / "other" / "train" / f"{number}.png")
    other = TrainingData(str(tmp_path / "other"), "none", ENCODERS, device=CPU)
    apart = Evaluator(evaluator.data, SIDE, evaluator.config, trained_on=other)
    features = apart.features(other.images("train", SIDE).pixels)
    assert apart.memorization.copied(features).value == 1
    assert evaluator.memorization.copied(features).value < 0.3


def test_the_grid_shows_each_image_above_its_nearest(evaluator: Evaluator) -> None:
    train = pictures(evaluator, "train")
    image = evaluator.nearest_grid(train[:10])
    columns = SAMPLE_GRID[1]

    def cell(row: int, column: int) -> Tensor:
        top, left = row * (SIDE + GRID_GAP), column * (SIDE + GRID_GAP)
        return image[:, top : top + SIDE, left : left + SIDE]

    for number in range(10):
        row, column = 2 * (number // columns), number % columns
        assert torch.equal(cell(row, column), train[number])
        assert torch.equal(cell(row + 1, column), train[number]), "the nearest training image is the image itself"
    assert (cell(2, 2) == 255).all(), "a row that is not full ends in white"
    heldout = {tuple(picture.flatten().tolist()) for picture in pictures(evaluator, "val")}
    assert all(tuple(cell(4, column).flatten().tolist()) in heldout for column in range(columns))
    assert image.shape[1] == 6 * (SIDE + GRID_GAP) - GRID_GAP
