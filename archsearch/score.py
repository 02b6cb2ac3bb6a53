"""What is known of a candidate: cost, latency record and quality, and the numbers a study may optimise."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from archsearch.stats.estimate import Estimate
from snapgen.config import Config
from snapgen.errors import InputError

INCEPTION = "inception"
"""The extractor whose Fréchet distance may be called FID: the Inception net of the original FID code."""


QUALITY_METRICS = ("validation_loss", "frechet_distance", "kernel_distance")
"""The metrics of `Quality`, by the names of its fields."""


class MissingScore(LookupError):
    """A score was asked for a number that was never taken."""


class ProtocolMismatch(InputError):
    """Two quality numbers of different protocols were about to be compared, ranked or drawn on one axis."""


class Quality(Config):
    """How good a short run was, under one protocol."""

    validation_loss: Estimate
    frechet_distance: Estimate | None = None
    kernel_distance: Estimate | None = None
    extractor: str = Field(min_length=1)
    protocol_hash: str = Field(min_length=1)
    training_seconds: float = Field(ge=0)
    diverged: bool = False


class Cost(Config):
    """What a forward pass needs at batch 1, counted, not measured."""

    params: int = Field(ge=0)
    macs: int = Field(ge=0)
    activation_bytes: int = Field(ge=0)
    """Peak of the live activations in fp16."""


class LatencyRecord(Config):
    """Milliseconds of one forward pass at batch 1, and all that they depend on."""

    median_ms: float = Field(gt=0)
    lower_quartile_ms: float = Field(gt=0)
    upper_quartile_ms: float = Field(gt=0)
    runs: int = Field(ge=0)
    """Forward passes behind the median; 0 for a number that was not measured here."""
    source: Literal["measured", "predicted", "published"]
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = Field(default=None, ge=1)
    load_ms: float = Field(ge=0)
    """Loading and preparing the model, which is not in the median."""
    runtime: str
    steady: bool
    """Whether the times settled; False: the median is of what there was when the time was up."""
    placement: dict[str, str] | None = None
    """Operator to compute units, with the number of its operations on each, where the runtime tells."""
    neural_engine_share: float | None = Field(default=None, ge=0, le=1)
    """Of the time that the runtime's plan estimates: on the Neural Engine."""
    neural_engine_operations: float | None = Field(default=None, ge=0, le=1)
    """Of the number of operations: on the Neural Engine."""
    thermal_state: str | None = None
    """Once measured, where the system tells."""
    interval_ms: tuple[float, float] | None = None
    """Of a prediction: where the true time is held to be, nine times out of ten; its quartiles, every other time."""

    @field_validator("placement")
    @classmethod
    def _own_copy(cls, placement: dict[str, str] | None) -> dict[str, str] | None:
        return None if placement is None else dict(placement)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.lower_quartile_ms <= self.median_ms <= self.upper_quartile_ms:
            raise ValueError(
                f"the quartiles {self.lower_quartile_ms:g} and {self.upper_quartile_ms:g} ms do not hold "
                f"the median {self.median_ms:g} ms; correct them"
            )
        if self.interval_ms and not self.interval_ms[0] <= self.median_ms <= self.interval_ms[1]:
            raise ValueError(f"the interval {self.interval_ms} ms does not hold {self.median_ms:g} ms; correct it")
        return self

    @property
    def conditions(self) -> tuple[str, str, str, str, str, str]:
        """Source, device, compute units, chip, threads, runtime: only latencies that share them can be ranked."""
        return self.source, self.device, self.compute_units, self.chip, str(self.threads), self.runtime


class Score(Config):
    """All that is known of one candidate; what has not been taken yet is None."""

    cost: Cost
    latency: LatencyRecord | None = None
    quality: Quality | None = None


class Metric(NamedTuple):
    """A number of the score that a study may minimise; a smaller one is better, always."""

    label: str
    unit: str
    """Of the number as `getter` gives it; empty: none."""
    getter: Callable[[Score], float]
    """The number of a score.

    Raises:
        Missing: if the score has none.
    """


def _of_cost(field: str) -> Callable[[Score], float]:
    return lambda score: float(getattr(score.cost, field))


def _of_quality(field: str) -> Callable[[Score], float]:
    def get(score: Score) -> float:
        if score.quality is None:
            raise MissingScore(f"no {field}: the candidate was not trained")
        estimate: Estimate | None = getattr(score.quality, field)
        if estimate is None:
            raise MissingScore(f"no {field}: the protocol draws no samples")
        return estimate.value

    return get


def _latency(score: Score) -> float:
    if score.latency is None:
        raise MissingScore("no latency_ms: the candidate was not timed")
    return score.latency.median_ms


OBJECTIVES: Mapping[str, Metric] = types.MappingProxyType(
    {
        "validation_loss": Metric("validation loss", "", _of_quality("validation_loss")),
        "frechet_distance": Metric("Fréchet distance", "", _of_quality("frechet_distance")),
        "kernel_distance": Metric("kernel distance", "", _of_quality("kernel_distance")),
        "latency_ms": Metric("latency", "ms", _latency),
        "params": Metric("parameters", "", _of_cost("params")),
        "macs": Metric("MACs", "", _of_cost("macs")),
        "activation_bytes": Metric("activation memory", "B", _of_cost("activation_bytes")),
    }
)


def metric_label(name: str, extractor: str) -> str:
    """An objective's name for people; a distance names its features: only Inception's may be called FID and KID.

    >>> metric_label("frechet_distance", "efficientnet-lite0")
    'Fréchet distance (efficientnet-lite0)'
    """
    inception = {"frechet_distance": "FID", "kernel_distance": "KID"}
    if name not in inception:
        return OBJECTIVES[name].label
    return inception[name] if extractor == INCEPTION else f"{OBJECTIVES[name].label} ({extractor})"


def comparable(a: Quality, b: Quality, *, difference: str | None = None) -> None:
    """Refuse to compare numbers of different protocols.

    Args:
        difference: what tells the protocols apart (``ResolvedProtocol.first_difference``), where it is known.

    Raises:
        Incomparable: if the hashes differ; the line names both, and the difference.
    """
    if a.protocol_hash == b.protocol_hash:
        return
    if difference is None and a.extractor != b.extractor:
        difference = f"extractor: {a.extractor} against {b.extractor}"
    raise ProtocolMismatch(
        "protocol",
        f"{a.protocol_hash} and {b.protocol_hash} are different" + (f" ({difference})" if difference else ""),
        "compare only numbers taken under the same protocol",
    )
