"""Data of a training are kept as long as it lasts, and no longer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import torch
from PIL import Image

from snapgen.conditioning.captions import TextEncoderConfig
from snapgen.training.data import TrainingData


def test_data_are_read_once_and_go_with_their_training(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / f"dot {number}.png")
    data = TrainingData(str(tmp_path), "none", [TextEncoderConfig(tokens=4)], device=torch.device("cpu"))
    encoded = data.encoded("train", 8)
    assert data.encoded("train", 8) is encoded
    assert data.images("train", 8) is encoded.images
    left = [weakref.ref(data), weakref.ref(encoded), weakref.ref(encoded.images)]
    gc.disable()
    try:
        del data, encoded
        assert [reference() for reference in left] == [None, None, None]
    finally:
        gc.enable()
