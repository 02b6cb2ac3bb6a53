"""Note beside a U-Net's weights that records its prediction type."""

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
    """Write the note into a U-Net's folder."""
    (folder / NOTE).write_text(json.dumps({"prediction": prediction}) + "\n")


def read_prediction_type(folder: Path) -> PredictionType | None:
    """Read the prediction type from the note in a folder; None if there is no note.

    Raises:
        InputError: if the note is damaged or names an unknown prediction type.
    """
    note = folder / NOTE
    return config.load_yaml(note, _Note).prediction if note.exists() else None
