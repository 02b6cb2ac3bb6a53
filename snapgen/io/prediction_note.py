"""What the U-Net in a folder predicts: a note beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

from snapgen import config as settings
from snapgen.config import Settings
from snapgen.diffusion.process import Prediction

NOTE = "prediction.json"


class _Note(Settings):
    prediction: Prediction


def write(folder: Path, prediction: Prediction) -> None:
    """Leave the note in a U-Net's folder."""
    (folder / NOTE).write_text(json.dumps({"prediction": prediction}) + "\n")


def read(folder: Path) -> Prediction | None:
    """What the note in a folder says; None without one.

    Raises:
        InputError: if it is damaged, or names no prediction of ours.
    """
    note = folder / NOTE
    return settings.load(note, _Note).prediction if note.exists() else None
