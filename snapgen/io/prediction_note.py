"""What the U-Net in a folder predicts: a note beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

from snapgen import config
from snapgen.config import Config
from snapgen.diffusion.process import PredictionType

NOTE = "prediction.json"


class _Note(Config):
    prediction: PredictionType


def write_prediction_type(folder: Path, prediction: PredictionType) -> None:
    """Leave the note in a U-Net's folder."""
    (folder / NOTE).write_text(json.dumps({"prediction": prediction}) + "\n")


def read_prediction_type(folder: Path) -> PredictionType | None:
    """What the note in a folder says; None without one.

    Raises:
        InputError: if it is damaged, or names no prediction of ours.
    """
    note = folder / NOTE
    return config.load_yaml(note, _Note).prediction if note.exists() else None
