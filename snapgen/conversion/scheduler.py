"""Prediction type of a diffusers net, from its pipeline's scheduler."""

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

PREDICTION_TYPE_NAMES: dict[str, PredictionType] = {
    "epsilon": "noise",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
"""Diffusers' values of ``prediction_type``, and ours."""
SCHEDULE: dict[str, object] = {**variance_preserving.SCHEDULE, "trained_betas": None, "rescale_betas_zero_snr": False}
"""Values that these scheduler fields must have, where present, for `snapgen.diffusion.variance_preserving`."""


@dataclass(frozen=True)
class PredictionSource:
    """The prediction type of a net, and where it is stated."""

    prediction: PredictionType | None
    """None: unknown."""
    reason: str
    """Where the prediction type is stated, or why it is unknown: a phrase."""


UNKNOWN = PredictionSource(None, f"without {SCHEDULER} it is not stated")


def prediction_source(folder: Path | None, stated: str | None = None) -> PredictionSource:
    """The prediction type of a pipeline's net.

    Args:
        folder: the pipeline's folder as diffusers writes it; None or a U-Net's own folder states no prediction type.
        stated: the prediction type that the user names.

    Raises:
        InputError: if the scheduler's file is damaged, ``stated`` is not one of our prediction types, or the two
            disagree.
    """
    if stated is not None and stated not in PREDICTION_TYPES:
        raise InputError(
            "--prediction", f"{stated!r:.30} is not a prediction type", f"use one of: {', '.join(PREDICTION_TYPES)}"
        )
    file = None if folder is None else folder / SCHEDULER
    from_file = UNKNOWN if file is None or not file.exists() else from_scheduler(read_json(file))
    if stated is None:
        return from_file
    if from_file.prediction not in (None, stated):
        problem = f"is {stated!r}, but {file} says {from_file.prediction!r}: {from_file.reason}"
        raise InputError("--prediction", problem, "leave the option out, or convert the U-Net's own folder")
    return PredictionSource(cast(PredictionType, stated), "by --prediction")


def from_scheduler(config: Mapping[str, Any]) -> PredictionSource:
    """The prediction type from a scheduler's configuration.

    Supported are rectified flow and Stable Diffusion 1.5's noise schedule. A field that is not in the file has the
    default of the scheduler's class; SD-1.5's own file has no ``prediction_type``.
    """
    name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        return PredictionSource(None, f"its scheduler is {name}, which diffusers does not have")
    if name.startswith("FlowMatch") and config.get("invert_sigmas"):
        return PredictionSource(None, f"its scheduler is {name} with invert_sigmas, which is not supported")
    if name.startswith("FlowMatch"):
        return PredictionSource("velocity", name)
    defaults = {field.name: field.default for field in inspect.signature(scheduler_class).parameters.values()}
    fields = {**defaults, **config}
    diffusers_type = fields.get("prediction_type")
    prediction = PREDICTION_TYPE_NAMES.get(diffusers_type) if isinstance(diffusers_type, str) else None
    reason = f"{name} with prediction_type {diffusers_type!r:.30}"
    if prediction is None:
        return PredictionSource(None, f"its scheduler is {reason}, which is not supported")
    different = [field for field, value in SCHEDULE.items() if fields.get(field, SCHEDULE[field]) != value]
    different = different or [field for field in variance_preserving.SCHEDULE if field not in fields]
    if prediction in variance_preserving.DIFFUSION_PREDICTION_TYPES and different:
        value = fields.get(different[0])
        return PredictionSource(None, f"its scheduler's {different[0]} is {value!r:.30}, not Stable Diffusion 1.5's")
    return PredictionSource(prediction, reason)
