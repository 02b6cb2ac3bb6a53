"""Every tracker takes numbers offline, and one that is not installed is told in a line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from snapgen.errors import InputError
from snapgen.training.trackers import Trackers, check_trackers


def test_tensorboard_has_the_numbers_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = Trackers(["tensorboard"], project="demo", run="01-base", folder=tmp_path)
    opened.log({"loss": 2.0, "rate": 0.5}, 1)
    opened.log({"loss": 1.0}, 2)
    opened.log_image("samples", torch.zeros(3, 4, 6, dtype=torch.uint8), 2)
    opened.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "01-base"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 6, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_others_work_offline(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    opened = Trackers([name], project="demo", run="01-base", folder=tmp_path)
    opened.log({"loss": 2.0}, 1)
    opened.log_image("samples", torch.zeros(3, 4, 6, dtype=torch.uint8), 1)
    opened.finish()
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_one_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="log_with: wandb is not installed; pip install wandb, or leave it out"):
        check_trackers(["wandb"])
