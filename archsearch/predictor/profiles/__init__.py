"""Shipped latency models of phones, fitted to published figures; their latencies are always predictions.

``figures.yaml`` holds the published figures, ``neural-engine.yaml`` the prior, and a YAML file per device the
tolerances of the figures that it is fitted to. `archsearch.predictor.profile_fitting` fits the models and writes them
as JSON files to this folder.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from archsearch.predictor.model import LatencyModel

NAMES = ("iphone-15-pro", "iphone-16-pro-max")
FOLDER = Path(str(resources.files(__name__)))


def model(name: str) -> LatencyModel:
    """Load the fitted model of a device in `NAMES`."""
    assert name in NAMES, name
    return LatencyModel.load(FOLDER / f"{name}.json")
