"""Scores that are read from a table, in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from archsearch.score import Cost, LatencyRecord, Quality
from archsearch.spaces.space import Space
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.scorer import Scorer
from archsearch.studies.tabular.table import ERROR_OF, BenchmarkTable, Entry, Run
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback

PREDICTED = "predicted:"
FILES = ("data", "autoencoder", "text_encoder", "feature_extractor", "init_from", "distillation")
"""Fields of a protocol that name files."""


class TableScorer(Scorer):
    """Scorer of a study that reads everything from a table; each training takes its time on a clock.

    Args:
        settings: those of the study.
        space: the study's space, as `space_on` gives it.
        seeds: seeds of the table's runs that stand for the protocol's seeds, in their order.
        sleep: lets simulated seconds pass.
    """

    def __init__(
        self,
        table: BenchmarkTable,
        settings: StudyConfig,
        space: Space,
        *,
        seeds: Sequence[int],
        sleep: Callable[[float], None],
    ) -> None:
        self._table, self._settings, self._space = table, settings, space
        self._run_seed = dict(zip(settings.protocol.train_seeds, seeds, strict=True))
        self._sleep = sleep
        self.spent = 0.0
        """Training so far, in whole runs."""
        self._entries = entries_by_id(table, space)

    def describe(self) -> Mapping[str, Any]:
        resolved = self._table.protocol
        return {"protocol": resolved.model_dump(mode="json"), "protocol_hash": resolved.hash, "machine": {}}

    def check(self, arch: Architecture) -> None:
        """Accept every architecture: those of the table were trained."""

    def cost(self, arch: Architecture) -> Cost:
        return cost_of(self._entries[arch.id], self._space)

    def latency(self, arch: Architecture) -> LatencyRecord:
        entry, device = self._entries[arch.id], self._settings.latency.device
        conditions: dict[str, Any] = {"interval_ms": None}
        low, ms, high = entry.quartiles_ms
        if self._space.proxy is not None:
            low = ms = high = latency_of(entry, self._space, device)
            conditions |= {"source": "predicted", "device": device, "runs": 0}
        values = {"lower_quartile_ms": low, "median_ms": ms, "upper_quartile_ms": high}
        return self._table.header.latency.model_copy(update={**conditions, **values})

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:  # noqa: ARG002
        return first

    def quality(
        self,
        arch: Architecture,
        *,
        seeds: Sequence[int],
        progress: ProgressCallback,  # noqa: ARG002
        artifacts: Path,  # noqa: ARG002
        until: int | None = None,
        begun: int = 0,
    ) -> Quality:
        """Quality of some of the table's runs, after the seconds that they took; see `Scorer.quality`.

        Args:
            until: step at which the run of a single seed pauses: one of `rung_steps`.
            begun: step at which it paused before.
        """
        steps = self._settings.protocol.steps
        runs = [self._table.short_runs[arch.id][self._run_seed[seed]] for seed in seeds]
        share = ((until or steps) - begun) / steps
        self._sleep(share * sum(run.seconds for run in runs))
        self.spent += share * len(runs)
        if until is not None:
            point = rung_steps(self._table).index(until)
            runs = [replace(run, scores={"validation_loss": run.curve.validation_loss[point]}) for run in runs]
        return _quality(runs, self._table, proxy=self._space.proxy)


def rung_steps(table: BenchmarkTable) -> list[int]:
    """Steps of the points of the short runs' curves, at which a replayed run can pause."""
    steps = table.protocol.protocol.steps
    points = min(
        len(run.curve.steps) for runs in table.short_runs.values() for run in runs.values() if not run.diverged
    )
    return [steps * (i + 1) // points for i in range(points)]


def _quality(runs: Sequence[Run], table: BenchmarkTable, *, proxy: Space | None) -> Quality:
    diverged = any(run.diverged for run in runs)

    def estimate(metric: str) -> Estimate | None:
        if diverged:
            from archsearch.quality.candidate_evaluator import WORST  # slow to import

            return Estimate.exact(WORST)
        if any(metric not in run.scores for run in runs):
            return None
        if metric not in ERROR_OF:
            return intervals.mean_over_seeds([run.scores[metric] for run in runs], 0.0)
        pairs = [DistanceEstimate(run.scores[metric], run.scores.get(ERROR_OF[metric], 0.0)) for run in runs]
        return intervals.distance_estimate(pairs)

    loss = estimate("validation_loss")
    assert loss is not None
    return Quality(
        validation_loss=loss,
        frechet_distance=estimate("frechet_distance"),
        kernel_distance=estimate("kernel_distance"),
        extractor=table.header.extractor,
        protocol_hash=table.protocol.hash,
        proxy=proxy.name if proxy is not None else None,
        training_seconds=sum(run.seconds for run in runs),
        diverged=diverged,
        curves=tuple(run.curve for run in runs),
    )


def cost_of(entry: Entry, space: Space) -> Cost:
    """Cost of an entry's architecture in the study's space: its own, or that of the full-size twin."""
    return entry.full_size if space.proxy is not None and entry.full_size is not None else entry.cost


def latency_of(entry: Entry, space: Space, device: str) -> float:
    """Latency of it on the study's device, in milliseconds: its own, or that which is predicted of the twin."""
    return entry.number("latency_ms" if space.proxy is None else device.removeprefix(PREDICTED))


def entries_by_id(table: BenchmarkTable, space: Space) -> dict[str, Entry]:
    """The table's entries by the id of the study's architecture: its own, or that of the full-size twin."""
    if space.proxy is None:
        return dict(table.entries)
    return {space.architecture(entry.point).id: entry for entry in table.entries.values()} | dict(table.entries)


def space_on(table: BenchmarkTable, settings: StudyConfig) -> Space:
    """The space that a study searches on a table, whose architectures it has.

    That is the study's own space if it is the table's, or that of its full-size twins with the table's as the proxy. A
    study of a larger space, which has all architectures of the table, searches these under the larger space's limits.

    Raises:
        InputError: if the study's space does not have the table's architectures, or its protocol, its seeds or its
            latency are not the table's.
    """
    space = settings.load_space()
    if space.proxy is not None:
        full_size = table.full_size
        if full_size is None or full_size.digest != space.digest:
            problem = f"{settings.space} with the proxy {settings.proxy} is not the space of {table.source}"
            raise InputError(settings.source, problem, "name a study of its space", place="space")
    elif space.digest != table.space.digest:
        space = _restricted(space, table, settings)
    _check_protocol(table, settings)
    device, header = settings.latency.device, table.header
    devices = [header.latency_device] if space.proxy is None else [f"{PREDICTED}{name}" for name in header.profiles]
    if device not in devices:
        problem = f"is {device}, of which {table.source} has no latencies for this space"
        raise InputError(settings.source, problem, f"use {' or '.join(devices)}", place="latency.device")
    return space


def _restricted(space: Space, table: BenchmarkTable, settings: StudyConfig) -> Space:
    outside = [
        entry.id for entry in table.entries.values() if space.point_of(table.space.architecture(entry.point)) is None
    ]
    if outside:
        problem = f"{space.name} lacks {len(outside)} of the {len(table.entries)} architectures of {table.source}"
        raise InputError(settings.source, problem, f"name a study of {table.space.name}", place="space")
    if settings.initial_points:
        problem = f"are points of {space.name}, but {table.source} is of {table.space.name}"
        raise InputError(settings.source, problem, "remove them", place="initial_points")
    limits = [*table.space.constraints.items(), *space.constraints.items()]
    constraints = {name: min(bound for n, bound in limits if n == name) for name, _ in limits}
    return replace(table.space, constraints=constraints)


def _check_protocol(table: BenchmarkTable, settings: StudyConfig) -> None:
    if not settings.trains:
        problem = "no quality is among them, so nothing is trained"
        raise InputError(settings.source, problem, "replay a study that trains", place="objectives")
    for name in settings.quality_objectives:
        if not table.true_values(name):
            problem = f"the runs of {table.source} have no {name}"
            raise InputError(settings.source, problem, "name a score that they have", place="objectives")
    own, protocol = settings.protocol.model_copy(update={"train_seeds": table.seeds}), table.protocol.protocol
    # Files count by their names here, as those of the table may not be at hand.
    names = [
        f"{n}: {getattr(own, n)} against {getattr(protocol, n)}"
        for n in FILES
        if getattr(own, n) != getattr(protocol, n)
    ]
    difference = table.protocol.model_copy(update={"protocol": own}).first_difference(table.protocol)
    if (difference := next(iter(names), difference)) is not None:
        place, _, values = difference.partition(": ")
        problem = f"is {values} in {table.source}"
        raise InputError(settings.source, problem, "make the two alike", place=f"protocol.{place}")
    for i, step in enumerate(settings.rungs.steps if settings.rungs is not None else ()):
        if step not in (known := rung_steps(table)) or settings.quality_objectives != ("validation_loss",):
            problem = f"is {step}, but {table.source} has validation losses at steps {', '.join(map(str, known))} alone"
            raise InputError(settings.source, problem, "use some of these, for that number", place=f"rungs.steps[{i}]")
    wanted = len(settings.protocol.train_seeds)
    if wanted > len(table.seeds):
        problem = f"lists {wanted} seeds, but {table.source} has {len(table.seeds)} runs of each architecture"
        place = "seeds.front" if settings.seeds is not None else "protocol.train_seeds"
        raise InputError(settings.source, problem, f"use at most {len(table.seeds)}", place=place)
