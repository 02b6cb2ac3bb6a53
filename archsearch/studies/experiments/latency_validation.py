"""Latency records to learn from, out of a file or a study, and the card of a model held to others of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archsearch.latency import records as timings
from archsearch.latency.records import LatencySample
from archsearch.predictor.model import LatencyModel, baseline_amounts
from archsearch.stats.rank_correlation import FEWEST, Correlation, spearman
from snapgen.errors import InputError


def load_records(source: str) -> list[LatencySample]:
    """One measured record of each net.

    Args:
        source: a file of ``archsearch latency sample``; or a study, by its name or its YAML.

    Raises:
        InputError: if it is neither, or the study has none.
    """
    path = Path(source)
    if path.suffix and path.suffix not in (".yaml", ".yml"):
        return timings.fastest_per_net(timings.load_samples(path))
    from archsearch.studies.search.candidates import load_candidates
    from archsearch.studies.storage.database import open_study

    study = open_study(source)
    space = study.user_attrs["space"]
    found = [
        LatencySample(
            architecture=candidate.architecture,
            latent_size=space["latent_size"],
            context_tokens=space["context_tokens"],
            record=candidate.score.latency,
        )
        for candidate in load_candidates(study, artifacts=False)
        if candidate.score.latency is not None and candidate.score.latency.source == "measured"
    ]
    if not found:
        raise InputError(source, "has no measured latency yet", "run archsearch search, or archsearch latency sample")
    return timings.fastest_per_net(found)


@dataclass(frozen=True)
class Row:
    """How well one way of predicting does. ``coverage``: the share of nets in its interval, where it gives one."""

    name: str
    spearman: Correlation | None
    kendall: float
    within_5: float
    within_10: float
    coverage: float | None = None


@dataclass(frozen=True)
class ValidationReport:
    """A model and its baselines on nets that it was not fitted to.

    Attributes:
        nets: how many.
        known: records left out because the model was fitted to their nets.
        interval: median of the interval's upper end over the prediction, less one.
    """

    nets: int
    known: int
    interval: float
    rows: tuple[Row, ...]


def validate_model(
    model: LatencyModel, records: Sequence[LatencySample], *, source: str = "records"
) -> ValidationReport:
    """Hold a model to records.

    Raises:
        InputError: if they are of another device than the model, or too few that it was not fitted to.
    """
    for timed in records:
        for field in ("device", "chip", "threads"):
            theirs, ours = getattr(timed.record, field), getattr(model, field)
            if theirs != ours:
                problem = f"its records are of the {field} {theirs}, the model of {ours}"
                raise InputError(source, problem, "hold it to records of what it was fitted to")
    held = [timed for timed in records if timed.architecture.id not in model.fitted_to]
    if len(held) < FEWEST:
        problem = f"has {len(held)} nets that the model was not fitted to"
        raise InputError(source, problem, "measure others: archsearch latency sample with another seed")
    times = np.array([timed.record.median_ms for timed in held])
    passes = [timed.operations() for timed in held]
    predictions = [model.predict(steps) for steps in passes]
    covered = [low <= time <= high for time, (_, (low, high), *_) in zip(times, predictions, strict=True)]
    rows = [_row("this model", times, [p.ms for p in predictions], coverage=float(np.mean(covered)))]
    amounts = [baseline_amounts(steps) for steps in passes]
    rows += [_row(f"{name} alone", times, line) for name, line in _lines(model.baselines, amounts).items()]
    interval = float(np.median([p.interval_ms[1] / p.ms for p in predictions])) - 1
    return ValidationReport(len(held), len(records) - len(held), interval, tuple(rows))


def _lines(
    baselines: Mapping[str, tuple[float, float]], amounts: Sequence[Mapping[str, float]]
) -> dict[str, list[float]]:
    return {name: [offset + slope * amount[name] for amount in amounts] for name, (offset, slope) in baselines.items()}


def _row(
    name: str,
    times: np.ndarray[tuple[int], np.dtype[np.float64]],
    predicted: Sequence[float],
    *,
    coverage: float | None = None,
) -> Row:
    from scipy.stats import kendalltau

    errors = np.abs(np.array(predicted) / times - 1)
    tau = float(kendalltau(predicted, times).statistic)
    return Row(
        name,
        spearman(predicted, times.tolist()),
        0.0 if math.isnan(tau) else tau,
        float(np.mean(errors <= 0.05)),
        float(np.mean(errors <= 0.1)),
        coverage,
    )
