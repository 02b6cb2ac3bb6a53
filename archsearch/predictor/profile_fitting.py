"""Fits the profiles' models to published figures: ``python -m archsearch.predictor.profile_fitting`` writes their JSON
files.

A device has fewer figures than its model has coefficients, so the prior decides whatever the figures leave open. The
figures that are only compared count for the interval, as if left out, which each fitted one is in turn.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from archsearch.cost.operations import Operation
from archsearch.predictor import profiles
from archsearch.predictor.model import FEATURES, FigureUse, LatencyModel, Residual, features, quantiles
from archsearch.predictor.reference_nets import ReferenceNet
from archsearch.stats.regression import Array, NormalPrior, Observation, fit, leave_one_out
from snapgen import config
from snapgen.config import Config
from snapgen.io.atomic import atomic_write

Positive = Annotated[float, Field(gt=0)]


class PublishedFigure(Config):
    """A published figure, as published: exactly one of ``ms``, ``per_second`` and ``ratio``."""

    what: str
    device: str
    net: ReferenceNet
    against: ReferenceNet | None = None
    ms: Positive | None = None
    per_second: Positive | None = None
    ratio: Positive | None = None
    source: str

    @model_validator(mode="after")
    def _is_one_figure(self) -> Self:
        if sum(value is not None for value in (self.ms, self.per_second, self.ratio)) != 1:
            raise ValueError("is not one figure; give one of ms, per_second and ratio")
        if (self.ratio is None) != (self.against is None):
            raise ValueError("a ratio is against another net, and nothing else is; mend against")
        return self

    @property
    def value(self) -> float:
        """Milliseconds, or the ratio."""
        if self.per_second is not None:
            return 1000 / self.per_second
        value = self.ms if self.ratio is None else self.ratio
        assert value is not None
        return value


class Figures(Config):
    """The file of them."""

    figures: tuple[PublishedFigure, ...]


class AcceleratorPrior(Config):
    """What is held of a kind of processor before any figure."""

    element_bytes: int
    cache_mb: float
    prior: dict[str, tuple[Positive, Positive]]
    """Of each feature: milliseconds for one, and their standard deviation over that."""

    def regression_prior(self) -> NormalPrior:
        """As the regression takes it, in the order of `FEATURES`."""
        mean, deviation = np.array([self.prior[name] for name in FEATURES]).T
        return NormalPrior(mean, mean * deviation)


class DeviceProfile(Config):
    """A device: its engine, and how far it trusts which device's figures."""

    engine: str
    chip: str
    tolerances: dict[str, Positive]
    """Device to the relative error taken for its figures; those of other devices are only compared."""

    def use(self, device: str, own: str) -> FigureUse:
        """What is made of a device's figures for the profile of the device ``own``."""
        return "check" if device not in self.tolerances else "fitted" if device == own else "borrowed"


def fit_profile(name: str) -> LatencyModel:
    """The model of a device of `archsearch.predictor.profiles.NAMES`, from its YAML and the figures."""
    profile = config.load_yaml(profiles.FOLDER / f"{name}.yaml", DeviceProfile)
    engine = config.load_yaml(profiles.FOLDER / profile.engine, AcceleratorPrior)
    prior = engine.regression_prior()
    own = profile.tolerances[name]
    figures = published()
    evidence = [_evidence(figure, profile.tolerances.get(figure.device, own), engine) for figure in figures]
    uses = [profile.use(figure.device, name) for figure in figures]
    fitting = [one for one, use in zip(evidence, uses, strict=True) if use != "check"]
    found = fit(fitting, prior)
    checks = [one for one, use in zip(evidence, uses, strict=True) if use == "check"]
    errors = leave_one_out(fitting, prior) + [found.error(one) for one in checks]
    return LatencyModel(
        device=name,
        compute_units="Neural Engine",
        chip=profile.chip,
        os="iOS",
        runtime="Core ML",
        element_bytes=engine.element_bytes,
        cache_mb=engine.cache_mb,
        coefficients=dict(zip(FEATURES, found.coefficients.tolist(), strict=True)),
        covariance=found.covariance.tolist(),
        tolerance=own,
        quantiles=quantiles(errors),
        residuals=tuple(
            _residual(figure, one, found.coefficients, use)
            for figure, one, use in zip(figures, evidence, uses, strict=True)
        ),
    )


def published() -> tuple[PublishedFigure, ...]:
    """Every figure of ``figures.yaml``."""
    return config.load_yaml(profiles.FOLDER / "figures.yaml", Figures).figures


def _evidence(figure: PublishedFigure, tolerance: float, engine: AcceleratorPrior) -> Observation:
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
    """A net's, which several figures may be of, counted once."""
    return net.operations()


def _residual(figure: PublishedFigure, evidence: Observation, coefficients: Array, used: FigureUse) -> Residual:
    return Residual(
        what=figure.what,
        device=figure.device,
        published=figure.value,
        predicted=figure.value * evidence.ratio(coefficients),
        unit="ms" if figure.ratio is None else "×",
        source=figure.source,
        used=used,
    )


def main() -> None:
    """Write every profile's model."""
    for name in profiles.NAMES:
        with atomic_write(profiles.FOLDER / f"{name}.json") as part:
            part.write_text(fit_profile(name).to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
