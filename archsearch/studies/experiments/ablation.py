"""Run an ablation: score every row of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archsearch.latency import records, repeats
from archsearch.score import QUALITY_METRICS, LatencyRecord
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.run import search
from archsearch.studies.search.scorer import ArchsearchScorer, Scorer, ScorerFactory
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study


FEWEST_SEEDS = 3


def ablate(
    settings: StudyConfig,
    *,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
) -> Study:
    """Score every row of an ablation, or go on with it; rows that are one architecture are scored once.

    Raises:
        InputError: if the study is no ablation, a row is wrong, or as `archsearch.studies.search.run.search`.
    """
    if settings.ablation is None:
        raise InputError(settings.source, "has no rows to ablate", "add ablation, or run archsearch search")
    seeds = settings.protocol.seeds
    if settings.trains and len(seeds) < FEWEST_SEEDS:
        problem = f"{len(seeds)} seeds can not tell a row from its neighbour"
        raise InputError(settings.source, problem, f"give {FEWEST_SEEDS} or more", place="protocol.seeds")
    study = search(_planned(settings), quiet=quiet, scorer=scorer)
    if settings.ablation.turns:
        study.set_user_attr("latencies", _in_turns(settings, scorer))
    return study


def _in_turns(settings: StudyConfig, scorer: ScorerFactory) -> dict[str, Any]:
    """The lowest of several latency records of every row, by architecture id; a file of the run holds them all."""
    assert settings.ablation is not None
    space = settings.load_space()
    timing = settings.with_changes({"objectives": ["latency_ms"], "limits": {}})
    archs = [space.architecture(point) for point in space.references.values()]
    path = settings.folder / "timings.jsonl"
    for _ in repeats.collect(_Scored(scorer(timing, space)), space, archs, path, most=settings.ablation.turns):
        pass
    return {
        timed.architecture.id: timed.record.model_dump(mode="json")
        for timed in records.fastest_per_net(records.load_samples(path))
    }


@dataclass(frozen=True)
class _Scored:
    """A scorer's latency as a backend."""

    scorer: Scorer

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:  # noqa: ARG002
        return self.scorer.latency(arch)


def train_rows_too(settings: StudyConfig, metric: str | None) -> StudyConfig:
    """The ablation with its rows trained too, ranked by a metric: a study of its own beside the one of costs.

    Raises:
        InputError: if it is no quality number.
    """
    if metric is None or metric in settings.objectives:
        return settings
    if metric not in QUALITY_METRICS:
        raise InputError("--quality", f"{metric!r:.60} is no quality number", f"use {', '.join(QUALITY_METRICS)}")
    rest = [name for name in settings.objectives if name not in QUALITY_METRICS]
    return settings.with_changes({"name": f"{settings.name}-{metric}", "objectives": [metric, *rest]})


def _planned(settings: StudyConfig) -> StudyConfig:
    """The study with the rows' architectures for its only candidates."""
    points = list(settings.load_space().references.values())
    plan = {"plan": [dict(point) for point in points], "trials": len(points)}
    return settings.with_changes({**plan, "minutes": None, "sampler": {"name": "random"}})
