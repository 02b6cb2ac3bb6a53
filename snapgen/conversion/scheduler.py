"""What a diffusers net was trained to predict, by the scheduler that its pipeline draws with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers

from snapgen.diffusion import variance_preserving
from snapgen.diffusion.process import PREDICTION_TYPES, PredictionType
from snapgen.errors import InputError
from snapgen.io.pretrained import SCHEDULER, read_json

OURS: dict[str, PredictionType] = {"epsilon": "noise", "v_prediction": "v", "flow_prediction": "velocity"}
"""Diffusers' ``prediction_type`` in our words."""
SCHEDULE: dict[str, object] = {**variance_preserving.SCHEDULE, "trained_betas": None, "rescale_betas_zero_snr": False}
"""Fields that a scheduler of our diffusion has, as far as it has them."""


@dataclass(frozen=True)
class PredictionSource:
    """What a net predicts, in our words."""

    prediction: PredictionType | None
    """None: not known."""
    reason: str
    """What says so, or why nothing does: a phrase."""


UNKNOWN = PredictionSource(None, f"without {SCHEDULER} nothing says it")


def meaning(folder: Path | None, stated: str | None = None) -> PredictionSource:
    """What the net of a pipeline predicts.

    Args:
        folder: the pipeline's, as diffusers writes it; None, or a U-Net's own: nothing is said there.
        stated: what the user says that it is.

    Raises:
        InputError: if the scheduler's file is damaged, ``stated`` is no prediction of ours, or the two disagree.
    """
    if stated is not None and stated not in PREDICTION_TYPES:
        raise InputError(
            "--prediction", f"{stated!r:.30} is none of ours", f"use one of: {', '.join(PREDICTION_TYPES)}"
        )
    file = None if folder is None else folder / SCHEDULER
    found = UNKNOWN if file is None or not file.exists() else of_scheduler(read_json(file))
    if stated is None:
        return found
    if found.prediction not in (None, stated):
        problem = f"is {stated!r}, but {file} says {found.prediction!r}: {found.reason}"
        raise InputError("--prediction", problem, "leave the option out, or convert the U-Net's own folder")
    return PredictionSource(cast(PredictionType, stated), "by --prediction")


def of_scheduler(config: Mapping[str, Any]) -> PredictionSource:
    """What the net of a scheduler predicts: of rectified flow, or on Stable Diffusion 1.5's own schedule alone.

    A field that is not written has the default of the scheduler's class: SD-1.5's own file names no
    ``prediction_type``.
    """
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        return PredictionSource(None, f"its scheduler is {name}, which diffusers does not have")
    if name.startswith("FlowMatch"):
        return PredictionSource("velocity", name)
    defaults = {field.name: field.default for field in inspect.signature(kind).parameters.values()}
    fields = {**defaults, **config}
    said = fields.get("prediction_type")
    prediction = OURS.get(said) if isinstance(said, str) else None
    reason = f"{name} of prediction_type {said!r:.30}"
    if prediction is None:
        return PredictionSource(None, f"its scheduler is {reason}, of which we have none")
    other = [field for field, value in SCHEDULE.items() if fields.get(field, SCHEDULE[field]) != value]
    other = other or [field for field in variance_preserving.SCHEDULE if field not in fields]
    if prediction in variance_preserving.DIFFUSION_PREDICTION_TYPES and other:
        value = fields.get(other[0])
        return PredictionSource(None, f"its scheduler's {other[0]} is {value!r:.30}, not Stable Diffusion 1.5's")
    return PredictionSource(prediction, reason)
