"""Run an ablation by scoring all of its rows."""

from __future__ import annotations

from typing import Any

from optuna import Study

from archsearch.latency.records import SampleFile, fastest_per_net, load_samples
from archsearch.latency.repeats import measure_round_robin
from archsearch.score import QUALITY_METRICS
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.run import search
from archsearch.studies.search.scorer import ArchsearchScorer, ScorerFactory
from snapgen.errors import InputError
from snapgen.progress import ProgressLog

MIN_SEEDS = 3
"""Fewest training seeds of an ablation whose rows are trained."""


def ablate(
    settings: StudyConfig,
    *,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
) -> Study:
    """Score every row of an ablation, or resume it; rows with the same architecture are scored once.

    Raises:
        InputError: if the study is not an ablation, if a row is invalid, or for the reasons of
            `archsearch.studies.search.run.search`.
    """
    if settings.ablation is None:
        raise InputError(settings.source, "has no rows to ablate", "add ablation, or run archsearch search")
    seeds = settings.protocol.train_seeds
    if settings.trains and len(seeds) < MIN_SEEDS:
        problem = f"{len(seeds)} seeds cannot separate the effects of rows"
        raise InputError(settings.source, problem, f"give {MIN_SEEDS} or more", place="protocol.train_seeds")
    study = search(with_rows_as_points(settings), quiet=quiet, scorer=scorer)
    if settings.ablation.latency_repeats:
        study.set_user_attr("latencies", _measure_repeatedly(settings, scorer))
    return study


def _measure_repeatedly(settings: StudyConfig, scorer: ScorerFactory) -> dict[str, Any]:
    """The lowest of several latency records of every row, by architecture id; the run's timings.jsonl holds all."""
    assert settings.ablation is not None
    space = settings.load_space()
    latency_only = settings.with_changes({"objectives": ["latency_ms"], "constraints": {}})
    archs = [space.architecture(point) for point in space.references.values()]
    path = settings.folder / "timings.jsonl"
    log = ProgressLog(settings.name, "measured the latency of", "rows", len(archs))
    file = SampleFile(path, space.latent_size, space.context_tokens)
    measure_round_robin(
        scorer(latency_only, space).latency,
        archs,
        file.records(),
        save=file.append,
        max_repeats=settings.ablation.latency_repeats,
        failed=lambda *_: None,
        progress=log.items(len(archs)),
    )
    return {
        sample.architecture.id: sample.record.model_dump(mode="json") for sample in fastest_per_net(load_samples(path))
    }


def train_rows_too(settings: StudyConfig, metric: str | None) -> StudyConfig:
    """The ablation with a quality metric as its first objective, as a separate study in which the rows are trained.

    Args:
        metric: name of the metric; None, or an objective of the study: return the settings unchanged.

    Raises:
        InputError: if the metric is not a quality number.
    """
    if metric is None or metric in settings.objectives:
        return settings
    if metric not in QUALITY_METRICS:
        raise InputError("--quality", f"{metric!r:.60} is not a quality number", f"use {', '.join(QUALITY_METRICS)}")
    rest = [name for name in settings.objectives if name not in QUALITY_METRICS]
    return settings.with_changes({"name": f"{settings.name}-{metric}", "objectives": [metric, *rest]})


def with_rows_as_points(settings: StudyConfig) -> StudyConfig:
    """The study with the architectures of the rows as its only candidates."""
    points = list(settings.load_space().references.values())
    plan = {"initial_points": [dict(point) for point in points], "trials": len(points)}
    return settings.with_changes({**plan, "time_budget_minutes": None, "sampler": {"name": "random"}})
