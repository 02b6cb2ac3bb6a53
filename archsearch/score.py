"""The score of a candidate (cost, latency record, quality) and the metrics that a study may optimize."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import combine_seeds
from snapgen.config import Config
from snapgen.errors import InputError

INCEPTION = "inception"
"""Name of the feature extractor whose Fréchet distance may be called FID: the Inception net of the original FID code.
"""

QUALITY_METRICS = ("validation_loss", "frechet_distance", "kernel_distance")
"""The metrics of `Quality`, by field name."""


class MissingScore(LookupError):
    """Raised if a score does not hold the requested number because it was not measured."""


class ProtocolMismatch(InputError):
    """Raised before quality numbers of different protocols are compared, ranked or drawn on one axis."""


class RuntimeMismatch(InputError):
    """Raised before latencies of different runtimes are compared or ranked."""


RUNTIMES: Mapping[str, str] = types.MappingProxyType(
    {"Core ML": "Core ML", "Core AI": "Core AI", "onnxruntime": "ONNX Runtime", "torch": "torch"}
)
"""Runtimes by what the field `LatencyRecord.runtime` begins with."""


class Curve(Config):
    """Validation loss of one training run at evenly spaced steps, the last of which is the final one."""

    steps: tuple[int, ...]
    validation_loss: tuple[float, ...]
    by_timestep: tuple[tuple[float, ...], ...]
    """At each of these steps, the mean over the validation pairs of the lowest timesteps, of the next, … (as many)."""

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if not len(self.steps) == len(self.validation_loss) == len(self.by_timestep):
            raise ValueError("the numbers of steps and of losses differ; give one of each for every step")
        return self


class Quality(Config):
    """Quality of a candidate after its short training runs, under one protocol."""

    validation_loss: Estimate
    frechet_distance: Estimate | None = None
    kernel_distance: Estimate | None = None
    retrieval_mrr: Estimate | None = None
    """Mean reciprocal rank of the samples' captions; higher is better, and no study optimizes it."""
    extractor: str = Field(min_length=1)
    protocol_hash: str = Field(min_length=1)
    proxy: str | None = None
    """Name of the space whose candidate, the twin, was trained in place of the architecture; None: it was itself."""
    training_seconds: float = Field(ge=0)
    diverged: bool = False
    curves: tuple[Curve, ...] = ()
    """Of each training run, in the order of the seeds."""

    @property
    def runs(self) -> int:
        """Number of training runs, one per seed; a diverged quality, which has no value per seed, counts as one."""
        return len(self.validation_loss.by_seed) or 1

    def covers(self, runs: int) -> bool:
        """Whether it tells what so many runs would give; of a diverged candidate more are not made."""
        return self.diverged or self.runs >= runs

    def with_seeds(self, other: Quality) -> Quality:
        """The quality over the seeds of both, which are of one candidate under one protocol."""
        comparable(self, other)
        both = {
            "training_seconds": self.training_seconds + other.training_seconds,
            "curves": (*self.curves, *other.curves),
        }
        if self.diverged or other.diverged:
            return (self if self.diverged else other).model_copy(update=both)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in (*QUALITY_METRICS, "retrieval_mrr")}
        combined = {name: combine_seeds(pair) for name, pair in pairs.items() if None not in pair}
        return self.model_copy(update={**combined, **both})


class Cost(Config):
    """Cost of one forward pass at batch size 1, counted on the meta device rather than measured."""

    params: int = Field(ge=0)
    macs: int = Field(ge=0)
    activation_bytes: int = Field(ge=0)
    """Peak size of the live activations in fp16."""


class LatencyRecord(Config):
    """Latency of one forward pass at batch size 1 in milliseconds, with the conditions that it was obtained under."""

    median_ms: float = Field(gt=0)
    lower_quartile_ms: float = Field(gt=0)
    upper_quartile_ms: float = Field(gt=0)
    runs: int = Field(ge=0)
    """Number of timed forward passes; 0 for a number that was not measured here."""
    source: Literal["measured", "predicted", "published"]
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = Field(default=None, ge=1)
    load_ms: float = Field(ge=0)
    """Time to load and prepare the model; not part of the median."""
    runtime: str
    steady: bool
    """Whether the times reached a steady state; if False, the median is over the runs made before the time limit."""
    placement: dict[str, str] | None = None
    """Compute units of each operator, with the number of operations on each, if the runtime reports them."""
    neural_engine_share: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the time estimated by the runtime's compute plan that is spent on the Neural Engine."""
    neural_engine_operations: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the operations that run on the Neural Engine."""
    thermal_state: str | None = None
    """Thermal state of the device after the measurement, if the system reports it."""
    interval_ms: tuple[float, float] | None = None
    """90 % interval of a prediction; the quartiles of a prediction are its 50 % interval."""

    @field_validator("placement")
    @classmethod
    def _own_copy(cls, placement: dict[str, str] | None) -> dict[str, str] | None:
        return None if placement is None else dict(placement)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.lower_quartile_ms <= self.median_ms <= self.upper_quartile_ms:
            raise ValueError(
                f"the quartiles {self.lower_quartile_ms:g} and {self.upper_quartile_ms:g} ms do not enclose "
                f"the median {self.median_ms:g} ms; correct them"
            )
        if self.interval_ms and not self.interval_ms[0] <= self.median_ms <= self.interval_ms[1]:
            raise ValueError(f"the interval {self.interval_ms} ms does not contain {self.median_ms:g} ms; correct it")
        return self

    @property
    def estimate(self) -> Estimate:
        """The median with its quartiles, or a prediction with its 90 % interval."""
        low, high = self.interval_ms or (self.lower_quartile_ms, self.upper_quartile_ms)
        return Estimate(value=self.median_ms, low=low, high=high)

    @property
    def interval_name(self) -> str:
        """Name of the interval of `estimate`."""
        return "90 % interval" if self.interval_ms else "quartiles"

    @property
    def engine(self) -> str:
        """The runtime without its version: Core ML, Core AI, ONNX Runtime or torch, or as the record has it."""
        return _engine(self.runtime)

    @property
    def conditions(self) -> tuple[str, str, str, str, str, str]:
        """Source, device, compute units, chip, threads, runtime: only latencies with equal conditions can be ranked."""
        return self.source, self.device, self.compute_units, self.chip, str(self.threads), self.runtime


class Score(Config):
    """Cost, latency and quality of one candidate; None for what has not been measured."""

    cost: Cost
    latency: LatencyRecord | None = None
    quality: Quality | None = None

    def value(self, name: str) -> float:
        """One number, by its name in `OBJECTIVES`.

        Raises:
            MissingScore: if it was not measured.
        """
        if name not in QUALITY_METRICS and name != "latency_ms":
            return float(getattr(self.cost, name))
        if name == "latency_ms":
            if self.latency is None:
                raise MissingScore("no latency_ms: the latency was not measured")
            return self.latency.median_ms
        if self.quality is None:
            raise MissingScore(f"no {name}: the candidate was not trained")
        estimate: Estimate | None = getattr(self.quality, name)
        if estimate is None:
            raise MissingScore(f"no {name}: the protocol generates no samples")
        return estimate.value

    def find(self, name: str) -> float | None:
        """One number, as `value`; None if it was not measured."""
        try:
            return self.value(name)
        except MissingScore:
            return None


class Metric(NamedTuple):
    """A number of the score that a study may minimize; smaller is always better."""

    label: str
    unit: str = ""
    """Unit of the number as `Score.value` returns it; empty if it has none."""


OBJECTIVES: Mapping[str, Metric] = types.MappingProxyType(
    {
        "validation_loss": Metric("validation loss"),
        "frechet_distance": Metric("Fréchet distance"),
        "kernel_distance": Metric("kernel distance"),
        "latency_ms": Metric("latency", "ms"),
        "params": Metric("parameters"),
        "macs": Metric("MACs"),
        "activation_bytes": Metric("activation memory", "B"),
    }
)


def metric_label(name: str, extractor: str, proxy: str | None = None, records: Iterable[LatencyRecord] = ()) -> str:
    """Display name of a metric. Distances name their feature extractor; only Inception's are called FID and KID.

    Args:
        name: name of the metric in `OBJECTIVES`.
        extractor: the feature extractor.
        proxy: the space in which the quality was measured, if it was a twin's (`Quality.proxy`).
        records: the latencies that a latency's name is for: it says that they are predicted.

    >>> metric_label("frechet_distance", "efficientnet-lite0")
    'Fréchet distance (efficientnet-lite0)'
    >>> metric_label("validation_loss", "none", "snapgen-emoji")
    'validation loss of the twin in snapgen-emoji'
    """
    inception = {"frechet_distance": "FID", "kernel_distance": "KID"}
    label = OBJECTIVES[name].label
    if name == "latency_ms":
        predicted = {record.source == "predicted" for record in records}
        return f"{'partly ' if False in predicted else ''}predicted {label}" if True in predicted else label
    if name in inception:
        label = inception[name] if extractor == INCEPTION else f"{label} ({extractor})"
    return f"{label} of the twin in {proxy}" if proxy and name in QUALITY_METRICS else label


def interval_name(name: str, records: Iterable[LatencyRecord] = ()) -> str:
    """Name of the interval [a, b] of a metric; empty for one without an interval.

    Args:
        name: name of the metric in `OBJECTIVES`.
        records: the latencies that it is for.
    """
    if name in QUALITY_METRICS:
        return "95 % interval"
    return " or ".join(sorted({record.interval_name for record in records})) if name == "latency_ms" else ""


def _engine(runtime: str) -> str:
    return next((name for start, name in RUNTIMES.items() if runtime.startswith(start)), runtime)


def check_one_runtime(runtimes: Iterable[str], source: str | Path) -> None:
    """Check that latencies are of one runtime, of whatever version, from their records' field ``runtime``.

    Raises:
        RuntimeMismatch: if they are not: one graph takes twice the time in Core AI that it takes in Core ML.
    """
    engines = sorted({_engine(runtime) for runtime in runtimes})
    if len(engines) > 1:
        problem = f"has latencies of {' and '.join(engines)}, which are not comparable"
        raise RuntimeMismatch(source, problem, "compare those of one runtime; archsearch latency verify lists them")


def comparable(a: Quality, b: Quality, *, difference: str | None = None) -> None:
    """Check that two quality numbers were measured under the same protocol.

    Args:
        difference: the field in which the protocols differ (``ResolvedProtocol.first_difference``), if known.

    Raises:
        ProtocolMismatch: if the hashes differ; the message names both hashes and the difference.
    """
    if a.protocol_hash == b.protocol_hash:
        return
    if difference is None and a.extractor != b.extractor:
        difference = f"extractor: {a.extractor} against {b.extractor}"
    raise ProtocolMismatch(
        "protocol",
        f"{a.protocol_hash} and {b.protocol_hash} are different" + (f" ({difference})" if difference else ""),
        "compare only numbers measured under the same protocol",
    )
