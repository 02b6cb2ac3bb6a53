"""Load latency records from a file or a study, and validate a latency model against records it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from archsearch.latency import records as latency_records
from archsearch.latency.records import LatencySample
from archsearch.predictor.model import LatencyModel, baseline_amounts
from archsearch.score import check_one_runtime
from archsearch.stats.estimate import Estimate
from archsearch.stats.rank_correlation import MIN_CANDIDATES, spearman
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.storage.database import open_study
from snapgen.errors import InputError


def load_records(source: str) -> list[LatencySample]:
    """Load measured latency records, one per network.

    Args:
        source: a file written by ``archsearch latency sample``, or a study by its name or YAML file.

    Raises:
        InputError: if the source is neither, the study has no measured latency, or they are of several runtimes.
    """
    return latency_records.fastest_per_net(load_all_records(source))


def load_all_records(source: str) -> list[LatencySample]:
    """Load all measured latency records of a source; for the argument and the errors see `load_records`."""
    path = Path(source)
    if path.suffix and path.suffix not in (".yaml", ".yml"):
        if samples := latency_records.load_samples(path):
            return samples
        raise InputError(source, "has no records", "measure some: archsearch latency sample")
    study = open_study(source)
    space = study.user_attrs["space"]
    samples = [
        LatencySample(
            architecture=candidate.architecture,
            latent_size=space["latent_size"],
            context_tokens=space["context_tokens"],
            record=candidate.score.latency,
        )
        for candidate in load_candidates(study)
        if candidate.score.latency is not None and candidate.score.latency.source == "measured"
    ]
    if not samples:
        raise InputError(source, "has no measured latency yet", "run archsearch search, or archsearch latency sample")
    return samples


@dataclass(frozen=True)
class ValidationRow:
    """Accuracy of one predictor on the validation networks.

    Attributes:
        name: name of the predictor.
        spearman: Spearman correlation of predicted and measured latency.
        kendall: Kendall's τ of predicted and measured latency.
        within_5: share of networks with an error of at most 5 %.
        within_10: share of networks with an error of at most 10 %.
        coverage: share of networks inside the prediction interval; None for predictors without one.
    """

    name: str
    spearman: Estimate | None
    kendall: float
    within_5: float
    within_10: float
    coverage: float | None = None


@dataclass(frozen=True)
class ValidationReport:
    """Validation of a model and its baselines on networks that it was not fitted to.

    Attributes:
        nets: number of networks.
        excluded: number of records left out because the model was fitted to their networks.
        interval: median of (upper end of the prediction interval / prediction − 1).
        rows: the model's accuracy, then that of each baseline.
    """

    nets: int
    excluded: int
    interval: float
    rows: tuple[ValidationRow, ...]


def validate_model(
    model: LatencyModel, records: Sequence[LatencySample], *, source: str = "records"
) -> ValidationReport:
    """Validate a model against records of networks that it was not fitted to.

    Raises:
        InputError: if the records come from another device or runtime than the model, or too few networks remain.
    """
    check_one_runtime((model.runtime, *(sample.record.runtime for sample in records)), source)
    for sample in records:
        for field in ("device", "chip", "threads"):
            measured_on, fitted_on = getattr(sample.record, field), getattr(model, field)
            if measured_on != fitted_on:
                problem = f"its records have {field} {measured_on}, the model has {fitted_on}"
                raise InputError(source, problem, "validate the model against records of the device it was fitted to")
    heldout = [sample for sample in records if sample.architecture.id not in model.fitted_to]
    if len(heldout) < MIN_CANDIDATES:
        problem = f"has {len(heldout)} nets that the model was not fitted to"
        raise InputError(source, problem, "measure others: archsearch latency sample with another seed")
    times = np.array([sample.record.median_ms for sample in heldout])
    passes = [sample.operations() for sample in heldout]
    predictions = [model.predict(steps) for steps in passes]
    covered = [low <= time <= high for time, (_, (low, high), *_) in zip(times, predictions, strict=True)]
    rows = [_row("this model", times, [p.ms for p in predictions], coverage=float(np.mean(covered)))]
    amounts = [baseline_amounts(steps) for steps in passes]
    for name, (offset, slope) in model.baselines.items():
        rows.append(_row(f"{name} alone", times, [offset + slope * amount[name] for amount in amounts]))
    interval = float(np.median([p.interval_ms[1] / p.ms for p in predictions])) - 1
    return ValidationReport(len(heldout), len(records) - len(heldout), interval, tuple(rows))


def _row(
    name: str,
    times: np.ndarray[tuple[int], np.dtype[np.float64]],
    predicted: Sequence[float],
    *,
    coverage: float | None = None,
) -> ValidationRow:
    errors = np.abs(np.array(predicted) / times - 1)
    tau = float(kendalltau(predicted, times).statistic)
    return ValidationRow(
        name,
        spearman(predicted, times.tolist()),
        0.0 if math.isnan(tau) else tau,
        float(np.mean(errors <= 0.05)),
        float(np.mean(errors <= 0.1)),
        coverage,
    )
