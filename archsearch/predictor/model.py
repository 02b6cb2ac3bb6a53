"""Latency models: linear models of one device's latency, with prediction intervals.

A model is a JSON file with the time that a device takes for each kind of operation (per call, per billion MACs, per
megabyte moved), fitted to latency records (`fit_latency_model`) or to published figures
(`archsearch.predictor.profiles`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from archsearch.cost.operations import KINDS, Kind, Operation
from archsearch.latency.records import LatencySample, condition_mismatch
from archsearch.score import LatencyRecord
from archsearch.stats.regression import (
    Array,
    LinearFit,
    Observation,
    best_tolerance,
    conformal_quantile,
    fit,
    leave_one_out,
    weak_prior,
)
from snapgen import config
from snapgen.config import Config, rule
from snapgen.errors import InputError

COVERAGE = 0.9
"""Coverage of a prediction's interval."""

MAX_INTERVAL_FACTOR = 1000.0
"""Largest ratio of an interval's end to the prediction; a prediction with such an interval is meaningless."""

MIN_RECORDS = 10
"""Fewest records to fit a model: with fewer, the interval would be the largest error, regardless of the coverage."""

ELEMENT_BYTES = {"host": 4}
"""Size of an element on devices that run float32; all others run float16."""

KINDS_WITH_MACS: tuple[Kind, ...] = ("conv", "depthwise", "pointwise", "linear", "attention")

FEATURES = (
    *(f"{kind} calls" for kind in KINDS),
    *(f"{kind} GMACs" for kind in KINDS_WITH_MACS),
    *(f"{kind} MB" for kind in KINDS),
    "attention heads",
    "spilled conv GMACs",
    "weights MB",
)
"""Features of a net: dispatches, arithmetic and memory traffic of each kind of operation.

Attention heads are counted separately because each is a pair of matrix products of its own, however small.
"""


def features(steps: Sequence[Operation], *, element_bytes: int, cache_mb: float | None) -> Array:
    """Feature vector of a net, in the order of `FEATURES`.

    Args:
        steps: operations of the net.
        element_bytes: size of an activation or a weight on the device.
        cache_mb: size of the device's fast memory. If the activations of a dense convolution, for one image of the
            batch, exceed it, the fraction of its MACs that must fetch activations again counts as *spilled*.
    """
    amounts = dict.fromkeys(FEATURES, 0.0)
    for step in steps:
        megabytes = step.moved * element_bytes / 1e6
        amounts[f"{step.kind} calls"] += 1
        amounts[f"{step.kind} MB"] += megabytes
        amounts["weights MB"] += step.weights * element_bytes / 1e6
        if step.macs:
            amounts[f"{step.kind} GMACs"] += step.macs / 1e9
        if step.kind == "attention":
            amounts["attention heads"] += math.prod(step.shape[:-2])
        if step.kind == "conv" and cache_mb is not None:
            spilled = max(0.0, 1 - cache_mb / (megabytes / step.shape[0]))
            amounts["spilled conv GMACs"] += spilled * step.macs / 1e9
    return np.array([amounts[name] for name in FEATURES])


FigureUse = Literal["fitted", "borrowed", "check"]
"""Use of a published figure: fitted to; fitted to although it is another device's, with its own tolerance; or only
compared with the prediction."""


class Residual(Config):
    """A published figure and the model's prediction of it, in the figure's unit."""

    what: str
    device: str
    published: float
    predicted: float
    unit: Literal["ms", "×"]
    source: str
    used: FigureUse
    left_out: float | None = None
    """Prediction of a fit to the other figures; None for a figure that is only compared, or of an older model."""
    nets: tuple[str, ...] = ()
    """Ids of the architectures that the figure is of: one, or a net and the one that it is compared with."""

    @property
    def error(self) -> float:
        """Relative error: +0.1 means 10 % too high."""
        return self.predicted / self.published - 1

    @property
    def left_out_ratio(self) -> float | None:
        """Prediction of a fit to the other figures, relative to the published figure."""
        return None if self.left_out is None else self.left_out / self.published


class LatencyPrediction(NamedTuple):
    """Predicted latency of a net in milliseconds, with its interval of coverage `COVERAGE` and its 50 % interval.

    ``shares`` holds the estimated milliseconds of each kind of operation and of fetching the weights.
    """

    ms: float
    interval_ms: tuple[float, float]
    quartiles_ms: tuple[float, float]
    shares: dict[str, float]


class LatencyModel(Config):
    """Linear latency model of one device, under the conditions of the records or figures that it was fitted to."""

    version: Literal[1] = 1
    """Version of the file format and of the features."""
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = None
    runtime: str
    element_bytes: int = Field(ge=1, le=8)
    cache_mb: float | None = Field(default=None, gt=0)
    coefficients: dict[str, float]
    """Milliseconds per unit of each feature; features that never occurred in the fitted nets are missing."""
    covariance: tuple[tuple[float, ...], ...]
    """Covariance of the coefficients, in their order."""
    tolerance: float = Field(gt=0)
    """Relative error of a single latency."""
    quantiles: dict[Literal["half", "most"], float]
    """Multiples of the claimed deviation that covered half, and `COVERAGE`, of the left-out observations."""
    fitted_to: tuple[str, ...] = ()
    """Ids of the architectures whose records it was fitted to."""
    baselines: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Linear fit of the same records on each of `BASELINES`: milliseconds at zero, and per million."""
    residuals: tuple[Residual, ...] = ()
    """All published figures with their predictions, including those that the model does not fit well."""

    @rule
    def _fits_together(self) -> None:
        unknown = [name for name in self.coefficients if name not in FEATURES]
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r:.60}; use {', '.join(FEATURES)}")
        if any(value < 0 for value in self.coefficients.values()):
            raise ValueError("a coefficient is negative; fit the model again")
        size = len(self.coefficients)
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise ValueError(f"the covariance is not {size} × {size}; fit the model again")
        if self.quantiles.keys() != {"half", "most"}:
            raise ValueError("the keys of quantiles are not half and most; fit the model again")

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Load a model from a file.

        Raises:
            InputError: if it is not a model of this version.
        """
        return config.load_yaml(path, cls)

    def to_json(self) -> str:
        """The content of a model file: one line per field, numbers rounded to six digits."""
        values = _rounded(self.model_dump(mode="json", exclude_defaults=True))
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
        return '{\n  "version": 1,\n' + ",\n".join(lines) + "\n}\n"

    @property
    def regression(self) -> LinearFit:
        """The coefficients and their covariance as a `LinearFit`."""
        return LinearFit(np.array(list(self.coefficients.values())), np.array(self.covariance))

    @property
    def runtime_name(self) -> str:
        """The runtime of its records, with a digest of what the model predicts from."""
        plain = tuple(r.model_copy(update={"left_out": None, "nets": ()}) for r in self.residuals)
        content = self.model_copy(update={"residuals": plain}).to_json()
        return f"{self.runtime}, model {hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def was_fitted_to(self, net: str, against: str) -> bool:
        """Whether the ratio of two nets' latencies, by their ids, is a published figure that it was fitted to."""
        return any(sorted(r.nets) == sorted((net, against)) and r.used != "check" for r in self.residuals)

    @property
    def freedom(self) -> str:
        """How many figures or records decide how many coefficients, in a sentence."""
        figures = sum(r.used != "check" for r in self.residuals)
        count, what = (figures, "published figures") if self.residuals else (len(self.fitted_to), "nets")
        left = count - len(self.coefficients)
        text = f"Fitted to {count} {what}, {len(self.coefficients)} coefficients: "
        if left > 0:
            return f"{text}{left} degrees of freedom."
        return f"{text}no degrees of freedom are left, and prior estimates decide what the figures leave open."

    def predict(self, steps: Sequence[Operation]) -> LatencyPrediction:
        """Predict the latency of a net from its operations.

        Raises:
            InputError: if the net has a feature that did not occur in the fitted nets.
        """
        amounts = dict(
            zip(FEATURES, features(steps, element_bytes=self.element_bytes, cache_mb=self.cache_mb), strict=True)
        )
        unseen = [name for name, amount in amounts.items() if amount and name not in self.coefficients]
        if unseen:
            problem = f"cannot predict {unseen[0]}: no net that it was fitted to has any"
            raise InputError(f"predicted:{self.device}", problem, "fit it to records of such nets too")
        x = np.array([amounts[name] for name in self.coefficients])
        regression = self.regression
        contributions = x * regression.coefficients
        ms = float(contributions.sum())
        if ms <= 0:
            problem = "predicts zero for every operation of this net"
            raise InputError(f"predicted:{self.device}", problem, "fit it to records of such nets too")
        deviation = regression.deviation(Observation(x, ms, self.tolerance))

        def interval(quantile: float) -> tuple[float, float]:
            factor = math.exp(min(quantile * deviation, math.log(MAX_INTERVAL_FACTOR)))
            return ms / factor, ms * factor

        shares: dict[str, float] = {}
        for name, contribution in zip(self.coefficients, contributions, strict=True):
            kind = name.rpartition(" ")[0].removeprefix("spilled ")  # "spilled conv GMACs" -> "conv"
            shares[kind] = shares.get(kind, 0.0) + float(contribution)
        return LatencyPrediction(ms, interval(self.quantiles["most"]), interval(self.quantiles["half"]), shares)

    def record(self, prediction: LatencyPrediction) -> LatencyRecord:
        """A prediction as a latency record. Its conditions include a digest of the model, so models are not mixed."""
        return LatencyRecord(
            median_ms=prediction.ms,
            lower_quartile_ms=prediction.quartiles_ms[0],
            upper_quartile_ms=prediction.quartiles_ms[1],
            interval_ms=prediction.interval_ms,
            runs=0,
            source="predicted",
            device=self.device,
            compute_units=self.compute_units,
            chip=self.chip,
            os=self.os,
            threads=self.threads,
            load_ms=0,
            runtime=self.runtime_name,
            steady=True,
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def fit_latency_model(records: Sequence[LatencySample], *, source: str | Path = "records") -> LatencyModel:
    """Fit the latency model of a device to its records.

    Args:
        records: one record per net, all measured under the same conditions.
        source: file of the records, for error messages.

    Raises:
        InputError: if there are too few records, or their conditions differ.
    """
    _check(records, source)
    first = records[0].record
    element_bytes = ELEMENT_BYTES.get(first.device, 2)
    passes = [sample.operations() for sample in records]
    x = np.array([features(steps, element_bytes=element_bytes, cache_mb=None) for steps in passes])
    times = np.array([sample.record.median_ms for sample in records])
    present = x.any(0)  # features that occur in any net
    x = x[:, present]  # (nets, all features) -> (nets, features)
    prior = weak_prior(x, times)
    tolerance = best_tolerance(x, times, prior)
    observations = [Observation(row, time, tolerance) for row, time in zip(x, times, strict=True)]
    result = fit(observations, prior)
    return LatencyModel(
        **first.model_dump(include={"device", "compute_units", "chip", "os", "threads", "runtime"}),
        element_bytes=element_bytes,
        coefficients=dict(zip(np.array(FEATURES)[present].tolist(), result.coefficients.tolist(), strict=True)),
        covariance=result.covariance.tolist(),
        tolerance=tolerance,
        quantiles=quantiles(leave_one_out(observations, prior)),
        fitted_to=tuple(sample.architecture.id for sample in records),
        baselines={name: _line([baseline_amounts(steps)[name] for steps in passes], times) for name in BASELINES},
    )


def quantiles(errors: Sequence[tuple[float, float]]) -> dict[Literal["half", "most"], float]:
    """Conformal quantiles of normalized errors.

    Args:
        errors: errors and claimed deviations from `archsearch.stats.regression.leave_one_out`.
    """
    normalized = [error / claimed for error, claimed in errors]
    return {"half": conformal_quantile(normalized, 0.5), "most": conformal_quantile(normalized, COVERAGE)}


def _check(records: Sequence[LatencySample], source: str | Path) -> None:
    if len(records) < MIN_RECORDS:
        problem = f"has records of {len(records)} nets, too few to fit"
        raise InputError(source, problem, f"measure at least {MIN_RECORDS}: archsearch latency sample")
    conditions = {sample.record.conditions for sample in records}
    if len(conditions) > 1:
        problem = f"has records of different conditions: {condition_mismatch(conditions)}"
        raise InputError(source, problem, "fit each from a separate file")
    if "measured" not in {sample.record.source for sample in records}:
        raise InputError(source, f"has {records[0].record.source} records", "use measured records")


BASELINES = ("MACs", "params")
"""Single numbers that a latency model should predict better than."""


def baseline_amounts(steps: Sequence[Operation]) -> dict[str, float]:
    """Values of `BASELINES` for a net, in millions."""
    return {"MACs": sum(step.macs for step in steps) / 1e6, "params": sum(step.weights for step in steps) / 1e6}


def _line(amounts: Sequence[float], times: Array) -> tuple[float, float]:
    """Offset and slope of the line with the least squared relative error."""
    rows = np.stack([np.ones(len(times)), np.array(amounts)], 1) / times[:, None]
    offset, slope = np.linalg.lstsq(rows, np.ones(len(times)))[0]
    return float(offset), float(slope)
