"""Latency that is predicted, not measured: a model of one device, and how wrong it may be.

A model is data, a JSON file: what a device takes for each kind of operation (a call, a billion MACs, a megabyte moved),
fitted to records of the device (`fit_latency_model`) or to figures published of it (`archsearch.predictor.profiles`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from archsearch.cost.operations import KINDS, Kind, Operation
from archsearch.latency.records import LatencySample
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
from snapgen.config import Config
from snapgen.errors import InputError

COVERAGE = 0.9
"""Of the interval that a prediction carries."""


WIDEST = 1000.0
"""The interval's ends are at most so many times apart from the prediction, which then says nothing."""


FEWEST = 10
"""Records under which no model is fitted: its interval would be the largest error, whatever the coverage."""


ELEMENT_BYTES = {"host": 4}
"""Float32 there; every other device runs float16."""


COMPUTING: tuple[Kind, ...] = ("conv", "depthwise", "pointwise", "linear", "attention")


FEATURES = (
    *(f"{kind} calls" for kind in KINDS),
    *(f"{kind} GMACs" for kind in COMPUTING),
    *(f"{kind} MB" for kind in KINDS),
    "attention heads",
    "spilled conv GMACs",
    "weights MB",
)
"""What a net's time is the sum of: dispatches, arithmetic and memory traffic, a kind of operation at a time.

Attention's heads are those of its keys: each is a pair of matrix products of its own, however small.
"""


def features(steps: Sequence[Operation], *, element_bytes: int, cache_mb: float | None) -> Array:
    """What each of `FEATURES` comes to in a net.

    Args:
        element_bytes: of an activation or a weight on the device.
        cache_mb: its fast memory. Where the activations of a dense convolution, of one image of the batch, do not fit
            in it, the share of its MACs that has to fetch them again for every output channel is *spilled*.
    """
    found = dict.fromkeys(FEATURES, 0.0)
    for step in steps:
        megabytes = step.moved * element_bytes / 1e6
        found[f"{step.kind} calls"] += 1
        found[f"{step.kind} MB"] += megabytes
        found["weights MB"] += step.weights * element_bytes / 1e6
        if step.macs:
            found[f"{step.kind} GMACs"] += step.macs / 1e9
        if step.kind == "attention":
            found["attention heads"] += math.prod(step.shape[:-2])
        if step.kind == "conv" and cache_mb is not None:
            spilled = max(0.0, 1 - cache_mb / (megabytes / step.shape[0]))
            found["spilled conv GMACs"] += spilled * step.macs / 1e9
    return np.array([found[name] for name in FEATURES])


FigureUse = Literal["fitted", "borrowed", "check"]
"""Fitted to; fitted to, though it is another device's, and so with a tolerance of its own; or only compared."""


class Residual(Config):
    """A published figure beside what the model says of it, in the figure's own unit."""

    what: str
    device: str
    published: float
    predicted: float
    unit: Literal["ms", "×"]
    source: str
    used: FigureUse

    @property
    def error(self) -> float:
        """Relative: +0.1 is a tenth too much."""
        return self.predicted / self.published - 1


class LatencyPrediction(NamedTuple):
    """Milliseconds of a net; the interval that holds the truth at `COVERAGE`, and the one that holds it half the time.

    ``shares`` are what each kind of operation, and fetching the weights, adds to it: an estimate of its own.
    """

    ms: float
    interval_ms: tuple[float, float]
    quartiles_ms: tuple[float, float]
    shares: dict[str, float]


class LatencyModel(Config):
    """What one device takes, by `FEATURES`, under the conditions of the records or figures that it was fitted to."""

    version: Literal[1] = 1
    """Of the file's form and of the features' meaning."""
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = None
    runtime: str
    element_bytes: int = Field(ge=1, le=8)
    cache_mb: float | None = Field(default=None, gt=0)
    coefficients: dict[str, float]
    """Milliseconds for one of each feature; one that is not named was never seen, and nothing is known of it."""
    covariance: tuple[tuple[float, ...], ...]
    """Of the named coefficients, in their order."""
    tolerance: float = Field(gt=0)
    """Relative error of a single time."""
    quantiles: dict[Literal["half", "most"], float]
    """Claimed deviations that held half of the left-out evidence, and `COVERAGE` of it."""
    fitted_to: tuple[str, ...] = ()
    """Ids of the architectures whose records it was fitted to."""
    baselines: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """What the same records make of one number alone: milliseconds at zero, and for each million of it."""
    residuals: tuple[Residual, ...] = ()
    """Published figures, those that are missed included."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        unknown = [name for name in self.coefficients if name not in FEATURES]
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r:.60}; use {', '.join(FEATURES)}")
        if any(value < 0 for value in self.coefficients.values()):
            raise ValueError("a coefficient is below zero; fit the model again")
        size = len(self.coefficients)
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise ValueError(f"the covariance is not {size} × {size}; fit the model again")
        if self.quantiles.keys() != {"half", "most"}:
            raise ValueError("quantiles are not of half and most; fit the model again")
        return self

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """From a file.

        Raises:
            InputError: if it is no model of this version.
        """
        return config.load_yaml(path, cls)

    def to_json(self) -> str:
        """As a file has it, which `load` reads back: one line a field, numbers to six digits."""
        values = _rounded(self.model_dump(mode="json", exclude_defaults=True))
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
        return '{\n  "version": 1,\n' + ",\n".join(lines) + "\n}\n"

    @property
    def regression(self) -> LinearFit:
        """Its coefficients as the regression has them."""
        return LinearFit(np.array(list(self.coefficients.values())), np.array(self.covariance))

    def predict(self, steps: Sequence[Operation]) -> LatencyPrediction:
        """What a net of these operations takes.

        Raises:
            InputError: if it has a feature that nothing the model was fitted to had.
        """
        found = dict(
            zip(FEATURES, features(steps, element_bytes=self.element_bytes, cache_mb=self.cache_mb), strict=True)
        )
        unseen = [name for name, amount in found.items() if amount and name not in self.coefficients]
        if unseen:
            problem = f"knows nothing of {unseen[0]}: no net that it was fitted to had any"
            raise InputError(f"predicted:{self.device}", problem, "fit it to records of such nets too")
        x = np.array([found[name] for name in self.coefficients])
        regression = self.regression
        parts = x * regression.coefficients
        ms = float(parts.sum())
        if ms <= 0:
            problem = "gives every operation of this net no time"
            raise InputError(f"predicted:{self.device}", problem, "fit it to records of such nets too")
        deviation = regression.deviation(Observation(x, ms, self.tolerance))

        def within(quantile: float) -> tuple[float, float]:
            factor = math.exp(min(quantile * deviation, math.log(WIDEST)))
            return ms / factor, ms * factor

        shares: dict[str, float] = {}
        for name, part in zip(self.coefficients, parts, strict=True):
            group = name.rpartition(" ")[0].removeprefix("spilled ")
            shares[group] = shares.get(group, 0.0) + float(part)
        return LatencyPrediction(ms, within(self.quantiles["most"]), within(self.quantiles["half"]), shares)

    def record(self, prediction: LatencyPrediction) -> LatencyRecord:
        """A prediction as a latency record; two models of one device do not share its conditions."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
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
            runtime=f"{self.runtime}, model {digest}",
            steady=True,
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def fit_latency_model(records: Sequence[LatencySample], *, source: str | Path = "records") -> LatencyModel:
    """The model of a device that its records make.

    Args:
        records: one of each net, all under the same conditions.
        source: where they are from, for errors.

    Raises:
        InputError: if they are too few, or of several conditions.
    """
    _check(records, source)
    first = records[0].record
    element_bytes = ELEMENT_BYTES.get(first.device, 2)
    passes = [timed.operations() for timed in records]
    x = np.array([features(steps, element_bytes=element_bytes, cache_mb=None) for steps in passes])
    times = np.array([timed.record.median_ms for timed in records])
    seen = x.any(0)
    x = x[:, seen]
    prior = weak_prior(x, times)
    tolerance = best_tolerance(x, times, prior)
    evidence = [Observation(row, time, tolerance) for row, time in zip(x, times, strict=True)]
    found = fit(evidence, prior)
    return LatencyModel(
        **first.model_dump(include={"device", "compute_units", "chip", "os", "threads", "runtime"}),
        element_bytes=element_bytes,
        coefficients=dict(zip(np.array(FEATURES)[seen].tolist(), found.coefficients.tolist(), strict=True)),
        covariance=found.covariance.tolist(),
        tolerance=tolerance,
        quantiles=quantiles(leave_one_out(evidence, prior)),
        fitted_to=tuple(timed.architecture.id for timed in records),
        baselines={name: _line([baseline_amounts(steps)[name] for steps in passes], times) for name in BASELINES},
    )


def quantiles(errors: Sequence[tuple[float, float]]) -> dict[Literal["half", "most"], float]:
    """What a claimed deviation is worth, from left-out errors and their claims
    (`archsearch.stats.regression.leave_one_out`)."""
    normalised = [error / claimed for error, claimed in errors]
    return {"half": conformal_quantile(normalised, 0.5), "most": conformal_quantile(normalised, COVERAGE)}


def _check(records: Sequence[LatencySample], source: str | Path) -> None:
    if len(records) < FEWEST:
        problem = f"has records of {len(records)} nets, too few to fit"
        raise InputError(source, problem, f"measure at least {FEWEST}: archsearch latency sample")
    conditions = {timed.record.conditions for timed in records}
    if len(conditions) > 1:
        one, other = sorted(conditions)[:2]
        differing = next(f"{a} and {b}" for a, b in zip(one, other, strict=True) if a != b)
        raise InputError(source, f"has records of different conditions: {differing}", "fit each from a file of its own")
    if "measured" not in {timed.record.source for timed in records}:
        raise InputError(source, f"has {records[0].record.source} records", "fit to measured ones")


BASELINES = ("MACs", "params")


def baseline_amounts(steps: Sequence[Operation]) -> dict[str, float]:
    """Of `BASELINES`, in millions: what a prediction must beat to be worth its name."""
    return {"MACs": sum(step.macs for step in steps) / 1e6, "params": sum(step.weights for step in steps) / 1e6}


def _line(amounts: Sequence[float], times: Array) -> tuple[float, float]:
    """The straight line of least relative error."""
    rows = np.stack([np.ones(len(times)), np.array(amounts)], 1) / times[:, None]
    offset, slope = np.linalg.lstsq(rows, np.ones(len(times)))[0]
    return float(offset), float(slope)
