"""Numbers with a standard error or a confidence interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

from pydantic import model_validator

from snapgen.config import Config


class DistanceEstimate(NamedTuple):
    """A distance, its standard error, and the degrees of freedom of that error; None: it is practically known."""

    value: float
    error: float
    freedom: int | None = None


class Estimate(Config):
    """A number with its 95 % interval.

    The interval always contains the value: an end on the wrong side of it is moved to the value. A bootstrap interval,
    for example, may exclude its own estimate.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()
    """Value for each training seed so far, in the protocol's order."""
    errors: tuple[float, ...] = ()
    """Standard error of each seed's value from its finite number of samples; empty: it has none of its own."""
    error_freedom: int | None = None
    """Degrees of freedom of each of `errors`; None: they are practically known."""

    @model_validator(mode="before")
    @classmethod
    def _contains_its_value(cls, data: object) -> object:
        if not isinstance(data, Mapping) or not all(_is_number(data.get(k)) for k in ("value", "low", "high")):
            return data
        if data["low"] > data["high"]:
            raise ValueError(f"low {data['low']:g} is above high {data['high']:g}; swap them")
        return {**data, "low": min(data["low"], data["value"]), "high": max(data["high"], data["value"])}

    @classmethod
    def exact(cls, value: float) -> Self:
        """A number without uncertainty."""
        return cls(value=value, low=value, high=value)

    def __format__(self, spec: str) -> str:
        """The value and its interval, each in the format ``spec``.

        >>> format(Estimate(value=0.512, low=0.5, high=0.525), ".2f")
        '0.51 [0.50, 0.53]'
        """
        value, low, high = (format(number, spec) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
