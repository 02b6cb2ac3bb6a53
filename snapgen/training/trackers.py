"""Trackers of experiments, through accelerate's own classes: TensorBoard, trackio, wandb, mlflow.

Everything stays on this machine unless the environment says otherwise: wandb is offline without WANDB_MODE, and mlflow
writes beside the run without MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snapgen.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

TrackerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]

FLUSH_SECONDS = 2
"""Longest time for which TensorBoard's writer sleeps."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        InputError: naming the first that is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError("log_with", f"{name} is not installed", f"pip install {name}, or leave it out")


class Trackers:
    """The open trackers of one run.

    Args:
        names: the trackers.
        project: what runs are grouped by.
        run: name of the run.
        folder: where trackers that have no place of their own write.
        step: finished steps; what TensorBoard has of later ones is dropped.
    """

    def __init__(self, names: Sequence[TrackerName], *, project: str, run: str, folder: Path, step: int = 0) -> None:
        from accelerate import PartialState, tracking

        PartialState()  # its trackers ask it which process is the main one
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("MLFLOW_TRACKING_URI", (folder.resolve() / "mlruns").as_uri())
        opening: Mapping[str, Any] = {
            "tensorboard": lambda: tracking.TensorBoardTracker(
                run, folder / "tensorboard", purge_step=step + 1, flush_secs=FLUSH_SECONDS
            ),
            "trackio": lambda: tracking.TrackioTracker(project, name=run),
            "wandb": lambda: tracking.WandBTracker(project, name=run, dir=str(folder)),
            "mlflow": lambda: tracking.MLflowTracker(project, run_name=run),
        }
        self._open: list[tracking.GeneralTracker] = []
        for name in names:
            tracker = opening[name]()
            tracker.start()
            self._open.append(tracker)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers after a step."""
        for tracker in self._open:
            tracker.log({name: float(number) for name, number in numbers.items()}, step=step)

    def log_image(self, name: str, image: Tensor, step: int) -> None:
        """Log an image, (3, H, W) uint8, where the tracker takes images: trackio and mlflow do not."""
        pixels = image.permute(1, 2, 0).cpu().numpy()  # CHW → HWC
        for tracker in self._open:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [pixels]}, step=step)

    def finish(self) -> None:
        """Close them."""
        for tracker in self._open:
            tracker.finish()
        self._open = []
