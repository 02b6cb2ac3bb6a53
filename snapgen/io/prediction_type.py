"""The prediction type of a saved net: ``prediction_type`` in its own configuration."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from snapgen.diffusion.process import PREDICTION_TYPES, PredictionType
from snapgen.errors import InputError
from snapgen.io.pretrained import CONFIG_NAME, read_json

NOTES = ("prediction.json", "teacher.json")
"""Files beside a U-Net and a teacher in which earlier versions recorded it, as ``{"prediction": "velocity"}``."""


def read_prediction_type(folder: Path) -> PredictionType | None:
    """Read the prediction type of the net in a folder; None: it is not stated.

    Raises:
        InputError: if a file is damaged, or names an unknown prediction type.
    """
    path, place = folder / CONFIG_NAME, "prediction_type"
    value = read_json(path).get(place)
    if value is None:
        path, place = next((folder / note for note in NOTES if (folder / note).exists()), path), "prediction"
        if path.name == CONFIG_NAME:
            return None
        value = read_json(path).get(place)
    if value not in PREDICTION_TYPES:
        problem = f"{value!r:.30} is not a prediction type"
        raise InputError(path, problem, f"use one of: {', '.join(PREDICTION_TYPES)}", place=place)
    return cast(PredictionType, value)


def check_prediction_type(folder: Path, expected: str, *, required: bool = False) -> None:
    """Check that the net in a folder has the expected prediction type.

    Args:
        folder: the net's folder.
        expected: the prediction type.
        required: whether it must be stated, which nets of other origin do not do.

    Raises:
        InputError: if it has another one, or a file is damaged.
    """
    stored = read_prediction_type(folder)
    if stored is None and required:
        remedy = f'if it was trained to predict it, write "prediction_type": "{expected}" there'
        raise InputError(folder / CONFIG_NAME, "does not state what the net predicts", remedy, place="prediction_type")
    if stored not in (None, expected):
        raise InputError(folder, f"predicts {stored!r}, not {expected!r}", "name a net of the same prediction type")
