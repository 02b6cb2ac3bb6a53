"""Fitting of the shipped latency models to published figures.

``python -m archsearch.predictor.profile_fitting`` writes the models' JSON files. A device has fewer published figures
than its model has coefficients, so the prior determines what the figures leave open. Intervals are calibrated with the
leave-one-out errors of the fitted figures and the errors of those that are only compared.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated

import numpy as np
from pydantic import Field

from archsearch.cost.operations import Operation
from archsearch.predictor import profiles
from archsearch.predictor.model import FEATURES, FigureUse, LatencyModel, Residual, features, quantiles
from archsearch.predictor.reference_nets import ReferenceNet
from archsearch.stats.regression import Array, NormalPrior, Observation, fit, leave_one_out
from snapgen import config
from snapgen.config import Config, rule
from snapgen.io.atomic import atomic_write

Positive = Annotated[float, Field(gt=0)]


class PublishedFigure(Config):
    """A figure as published: exactly one of ``ms``, ``per_second`` and ``ratio``."""

    what: str
    device: str
    net: ReferenceNet
    against: ReferenceNet | None = None
    ms: Positive | None = None
    per_second: Positive | None = None
    ratio: Positive | None = None
    source: str

    @rule
    def _is_one_figure(self) -> None:
        if sum(value is not None for value in (self.ms, self.per_second, self.ratio)) != 1:
            raise ValueError("is not a single figure; give one of ms, per_second and ratio")
        if (self.ratio is None) != (self.against is None):
            raise ValueError("against is required for a ratio and not allowed otherwise; correct against")

    @property
    def value(self) -> float:
        """The figure in milliseconds, or the ratio."""
        if self.per_second is not None:
            return 1000 / self.per_second
        value = self.ms if self.ratio is None else self.ratio
        assert value is not None
        return value


class Figures(Config):
    """Schema of ``figures.yaml``."""

    figures: tuple[PublishedFigure, ...]


class AcceleratorPrior(Config):
    """Prior of the coefficients for a type of accelerator."""

    element_bytes: int
    cache_mb: float
    prior: dict[str, tuple[Positive, Positive]]
    """Milliseconds per unit of each feature, and their relative standard deviation."""

    def regression_prior(self) -> NormalPrior:
        """The prior as a `NormalPrior`, in the order of `FEATURES`."""
        mean, deviation = np.array([self.prior[name] for name in FEATURES]).T
        return NormalPrior(mean, mean * deviation)


class DeviceProfile(Config):
    """Profile of a device: its accelerator's prior, and the tolerances of the figures that it is fitted to."""

    engine: str
    chip: str
    tolerances: dict[str, Positive]
    """Relative error of the figures of each device; figures of devices that are not listed are only compared."""

    def use(self, device: str, own: str) -> FigureUse:
        """How the figures of ``device`` are used in the profile of the device ``own``."""
        return "check" if device not in self.tolerances else "fitted" if device == own else "borrowed"


def fit_profile(name: str) -> LatencyModel:
    """Fit the model of a device in `archsearch.predictor.profiles.NAMES` to the published figures."""
    profile = config.load_yaml(profiles.FOLDER / f"{name}.yaml", DeviceProfile)
    engine = config.load_yaml(profiles.FOLDER / profile.engine, AcceleratorPrior)
    prior = engine.regression_prior()
    own_tolerance = profile.tolerances[name]
    figures = published()
    observations = [
        observation(figure, profile.tolerances.get(figure.device, own_tolerance), engine) for figure in figures
    ]
    uses = [profile.use(figure.device, name) for figure in figures]
    fitted = [o for o, use in zip(observations, uses, strict=True) if use != "check"]
    result = fit(fitted, prior)
    checks = [o for o, use in zip(observations, uses, strict=True) if use == "check"]
    left_out = leave_one_out(fitted, prior)
    errors = left_out + [result.error(o) for o in checks]
    left_out_errors = iter(error for error, _ in left_out)
    return LatencyModel(
        device=name,
        compute_units="Neural Engine",
        chip=profile.chip,
        os="iOS",
        runtime="Core ML",
        element_bytes=engine.element_bytes,
        cache_mb=engine.cache_mb,
        coefficients=dict(zip(FEATURES, result.coefficients.tolist(), strict=True)),
        covariance=result.covariance.tolist(),
        tolerance=own_tolerance,
        quantiles=quantiles(errors),
        residuals=tuple(
            _residual(figure, o, result.coefficients, use, None if use == "check" else next(left_out_errors))
            for figure, o, use in zip(figures, observations, uses, strict=True)
        ),
    )


def published() -> tuple[PublishedFigure, ...]:
    """All figures of ``figures.yaml``."""
    return config.load_yaml(profiles.FOLDER / "figures.yaml", Figures).figures


def observation(figure: PublishedFigure, tolerance: float, engine: AcceleratorPrior) -> Observation:
    """A figure as what a model is fitted to, with its relative error."""
    return Observation(
        _features(figure.net, engine),
        figure.value,
        tolerance,
        against=None if figure.against is None else _features(figure.against, engine),
    )


def _features(net: ReferenceNet, engine: AcceleratorPrior) -> Array:
    return features(operations_of(net), element_bytes=engine.element_bytes, cache_mb=engine.cache_mb)


@cache
def operations_of(net: ReferenceNet) -> list[Operation]:
    """Operations of a net, cached because several figures may refer to the same net."""
    return net.operations()


def _residual(
    figure: PublishedFigure,
    observation: Observation,
    coefficients: Array,
    used: FigureUse,
    left_out_error: float | None,
) -> Residual:
    """A figure beside its prediction; ``left_out_error`` is the log error of a fit to the other figures."""
    nets = [net.architecture for net in (figure.net, figure.against) if net]
    return Residual(
        what=figure.what,
        device=figure.device,
        published=figure.value,
        predicted=figure.value * observation.ratio(coefficients),
        unit="ms" if figure.ratio is None else "×",
        source=figure.source,
        used=used,
        left_out=None if left_out_error is None else figure.value * math.exp(left_out_error),
        nets=tuple(arch.id for arch in nets if arch),
    )


def main() -> None:
    """Fit and write the model of every profile."""
    for name in profiles.NAMES:
        with atomic_write(profiles.FOLDER / f"{name}.json") as temporary:
            temporary.write_text(fit_profile(name).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
