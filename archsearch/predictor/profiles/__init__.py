"""Phones without a phone: models of devices, fitted to what is published of them. Always predictions.

``figures.yaml`` has every published figure, ``neural-engine.yaml`` what is held before any, and a YAML of each device
how far it trusts whose figures. `archsearch.predictor.profile_fitting` makes the models of them, the JSON files beside
them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from archsearch.predictor.model import LatencyModel

NAMES = ("iphone-15-pro", "iphone-16-pro-max")
FOLDER = Path(str(resources.files(__name__)))


def model(name: str) -> LatencyModel:
    """The fitted model of a device of `NAMES`."""
    assert name in NAMES, name
    return LatencyModel.load(FOLDER / f"{name}.json")
