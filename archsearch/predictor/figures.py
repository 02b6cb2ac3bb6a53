"""Published figures of Apple devices that no profile is fitted to, and what fitting to them would be worth.

``profiles/apple.yaml`` holds them. A profile is held to those of the Neural Engine in Core ML whose net we have; they
are of other nets and another chip than the profile's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from archsearch.predictor import profiles
from archsearch.predictor.profile_fitting import (
    AcceleratorPrior,
    DeviceProfile,
    PublishedFigure,
    observation,
    operations_of,
    published,
)
from archsearch.predictor.reference_nets import ReferenceNet
from archsearch.stats.regression import Observation, fit
from snapgen import config
from snapgen.config import Config

OTHER_CHIP = 0.25
"""Relative error that a figure of another chip is fitted with."""


class AppleFigure(Config):
    """A figure as published."""

    what: str
    tag: str
    """The source's own name of it."""
    device: str
    units: str
    """Compute units: ``Neural Engine``, ``GPU`` or ``unknown``."""
    runtime: str
    ms: float = Field(gt=0)
    spread_ms: float | None = Field(default=None, ge=0)
    """Interquartile range; None: not published."""
    net: ReferenceNet | None = None
    source: str

    @property
    def fits_profiles(self) -> bool:
        """Whether a profile, which is of the Neural Engine in Core ML, can be held to it."""
        return self.net is not None and self.units == "Neural Engine" and self.runtime == "Core ML"


class _Figures(Config):
    figures: tuple[AppleFigure, ...]


@dataclass(frozen=True)
class HeldOut:
    """A figure that a profile was not fitted to."""

    what: str
    device: str
    published_ms: float
    predicted_ms: float
    """By the profile as it is shipped."""
    refitted_ms: float
    """By a fit to the profile's figures and all other figures of `figures`, without this one."""


def figures() -> tuple[AppleFigure, ...]:
    """All figures of ``apple.yaml``."""
    return config.load_yaml(profiles.FOLDER / "apple.yaml", _Figures).figures


def held_out(name: str) -> list[HeldOut]:
    """The figures that the profile ``name`` is not fitted to, each predicted by the profile and by fits without it."""
    profile = config.load_yaml(profiles.FOLDER / f"{name}.yaml", DeviceProfile)
    engine = config.load_yaml(profiles.FOLDER / profile.engine, AcceleratorPrior)
    own = [f for f in published() if f.device in profile.tolerances]
    fitted = [observation(f, profile.tolerances[f.device], engine) for f in own]
    others = [f for f in published() if f.device not in profile.tolerances]
    others += [
        PublishedFigure(what=f"{f.what}, {f.tag}", device=f.device, net=f.net, ms=f.ms, source=f.source)
        for f in figures()
        if f.fits_profiles and f.net is not None
    ]
    extra = [observation(f, OTHER_CHIP, engine) for f in others]
    model = profiles.model(name)
    return [
        HeldOut(
            what=figure.what,
            device=figure.device,
            published_ms=figure.value,
            predicted_ms=model.predict(operations_of(figure.net)).ms,
            refitted_ms=_refitted(fitted, _without_net(extra, others, figure), engine, extra[number]),
        )
        for number, figure in enumerate(others)
    ]


def _without_net(extra: list[Observation], others: list[PublishedFigure], figure: PublishedFigure) -> list[Observation]:
    """The observations of other nets or devices: three rows of one net on one machine are one figure."""
    own = (figure.device, figure.net)
    return [o for o, other in zip(extra, others, strict=True) if (other.device, other.net) != own]


def _refitted(
    fitted: list[Observation], extra: list[Observation], engine: AcceleratorPrior, left_out: Observation
) -> float:
    found = fit([*fitted, *extra], engine.regression_prior())
    return float(left_out.value * left_out.ratio(found.coefficients))


def mean_error(ratios: list[float]) -> float:
    """The mean factor by which predictions miss, either way: 1 for none.

    >>> round(mean_error([2.0, 0.5]), 6)
    2.0
    """
    return math.exp(float(np.mean(np.abs(np.log(ratios)))))
