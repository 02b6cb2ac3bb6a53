"""Searches on a table: a study's own sampler, seeds and workers; trainings take time on a simulated clock alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna
from optuna import Study

from archsearch.score import Quality, Score
from archsearch.spaces.space import Space
from archsearch.studies.config.study import SAMPLERS, StudyConfig
from archsearch.studies.search.known_costs import COSTS, KnownCosts, known_numbers, upper_bounds
from archsearch.studies.search.pool import hidden_main, ignore_experimental_warnings
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.worker import Worker
from archsearch.studies.storage.database import silence_optuna
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.tabular.clock import SimulatedClock
from archsearch.studies.tabular.file import load_table
from archsearch.studies.tabular.scorer import PREDICTED, TableScorer, cost_of, entries_by_id, latency_of, space_on
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.architecture.schema import Architecture
from snapgen.config import parse_yaml
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback, ignore_progress
from snapgen.seeding import derive_seed


@dataclass(frozen=True)
class Scored:
    """A candidate with the score that a search has of it at some time.

    Attributes:
        seconds: simulated time at which the search got it.
        architecture_id: of the table's architecture.
        runs: number of training runs behind it.
        spent: training of the whole search so far, in whole runs.
        observed: values of the study's objectives.
        is_feasible: whether it meets all limits.
    """

    seconds: float
    architecture_id: str
    runs: int
    spent: float
    observed: tuple[float, ...]
    is_feasible: bool


@dataclass(frozen=True)
class Setting:
    """A study's settings that are compared with others."""

    label: str
    config: StudyConfig


def settings_of(config: StudyConfig, changes: Sequence[str], *, trials: int | None = None) -> list[Setting]:
    """The study's own settings, and those with changes.

    Args:
        changes: each the name of a sampler, or settings of a study as YAML: ``{sampler: gp, seeds: null}``.
        trials: number of candidates of each search; None: the study's own.

    Raises:
        InputError: if a change is invalid or given twice, or the study has no number of trials.
    """
    if config.ablation is not None or config.evolve is not None:
        raise InputError(config.source, "is not a search", "replay a search", place="sampler")
    trials = config.trials if trials is None else trials
    if trials is None:
        raise InputError(config.source, "has a budget of time alone", "give --trials", place="trials")
    shared = {"trials": trials, "time_budget_minutes": None, "start_from": None, "storage": None}
    base = config.with_changes(shared)
    settings = [Setting(config.sampler.name, base), *(_changed(base, text) for text in changes)]
    for i, setting in enumerate(settings):
        if any(setting.label == other.label for other in settings[:i]):
            of_study = ", or is the study's own sampler" if setting.label == config.sampler.name else ""
            raise InputError("--setting", f"{setting.label!r:.60} is there twice{of_study}", "give it once")
    return settings


def _changed(base: StudyConfig, text: str) -> Setting:
    try:
        changes = {"sampler": text} if text in SAMPLERS else parse_yaml(text, "--setting")
    except InputError:
        changes = None
    if not isinstance(changes, dict):
        remedy = f"use {', '.join(SAMPLERS)} or settings such as '{{sampler: gp, seeds: null}}'"
        raise InputError("--setting", f"{text!r:.60} is neither a sampler nor settings", remedy)
    return Setting(text, base.with_changes(changes, source=f"--setting {text}"))


def replay(
    table_path: str | Path,
    settings: Sequence[Setting],
    *,
    seeds: int,
    processes: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> list[list[list[Scored]]]:
    """Run searches on a table.

    Args:
        table_path: the table's file.
        settings: those that are compared.
        seeds: number of searches of each, which differ in the sampler's seed and in the order of the table's seeds.
        processes: processes that search; None: one per CPU.
        progress: called with the completed fraction.

    Returns:
        For each setting and seed, what the search scored, in the order of time.

    Raises:
        InputError: if the table is damaged, or a study is not of its space and protocol.
    """
    table = load_table(table_path)
    spaces = [space_on(table, setting.config) for setting in settings]
    jobs = [
        (setting.config, seed, space) for setting, space in zip(settings, spaces, strict=True) for seed in range(seeds)
    ]
    processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    found: list[list[Scored]] = []
    for history in _map(str(table_path), table, jobs, processes):
        found.append(history)
        progress(len(found) / len(jobs), "searching")
    return [found[i : i + seeds] for i in range(0, len(found), seeds)]


Job = tuple[StudyConfig, int, "Space"]


def _map(path: str, table: BenchmarkTable, jobs: Sequence[Job], processes: int) -> Iterator[list[Scored]]:
    if processes == 1:
        yield from (simulate(table, *job) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        with hidden_main():  # the processes start with the first jobs
            found = pool.map(functools.partial(_job, path), jobs)
        yield from found


def _job(path: str, job: Job) -> list[Scored]:
    return simulate(_loaded(path), *job)


_loaded = functools.lru_cache(maxsize=1)(load_table)


def simulate(table: BenchmarkTable, config: StudyConfig, seed: int, space: Space | None = None) -> list[Scored]:
    """One search of a study on a table, by the workers, the queue and the proposer of a real one.

    Args:
        seed: seed of the sampler, and of the order in which the table's seeds stand for the study's.
        space: the study's space on the table, if it was found before.

    Returns:
        What it scored, in the order of time.
    """
    config = config.with_changes({"seed": seed})
    space = space or space_on(table, config)
    order = np.random.default_rng(derive_seed(seed, "runs")).permutation(table.seeds)
    clock = SimulatedClock()
    scorer = TableScorer(
        table,
        config,
        space,
        seeds=[int(s) for s in order[: len(config.protocol.train_seeds)]],
        sleep=clock.sleep,
    )
    history: list[Scored] = []
    with silence_optuna(), ignore_experimental_warnings():
        storage = optuna.storages.InMemoryStorage()
        sampler = optuna.samplers.RandomSampler()  # never asked: the proposer asks the study's own
        study = optuna.create_study(storage=storage, directions=["minimize"] * len(config.objectives), sampler=sampler)
        for key, value in {"settings": config.model_dump(mode="json"), **scorer.describe()}.items():
            study.set_user_attr(key, value)
        numbers = _known_numbers(table, config, space)
        workers = [
            _ReplayWorker(study, config, space, scorer, numbers=numbers, clock=clock, history=history)
            for _ in range(config.workers)
        ]
        clock.run([worker.run for worker in workers])
    return history


class _ReplayWorker(Worker):
    """A worker that waits on a simulated clock, keeps no files, and notes what it has scored."""

    def __init__(
        self,
        study: Study,
        config: StudyConfig,
        space: Space,
        scorer: TableScorer,
        *,
        numbers: Mapping[str, dict[str, float]],
        clock: SimulatedClock,
        history: list[Scored],
    ) -> None:
        known = KnownCosts(config, space, numbers=numbers)
        super().__init__(study, config, space, scorer, Proposer(config, space, known=known), log=_refuse)
        self._table_scorer, self._clock, self._history = scorer, clock, history

    def _wait(self) -> None:
        self._clock.wait()

    def _let_go(self) -> None:
        """Give up none of the paused trainings, which have no files: going on costs only what is left of them."""

    def _train(
        self,
        claim: TrialRecord,  # noqa: ARG002
        arch: Architecture,
        seeds: Sequence[int],
        *,
        until: int | None = None,
        paused: Candidate | None = None,
    ) -> Quality:
        begun = paused.rungs[-1].step if paused else 0
        return self._table_scorer.quality(
            arch, seeds=seeds, progress=ignore_progress, artifacts=Path(), until=until, begun=begun
        )

    def _finish(self, claim: TrialRecord, score: Score) -> None:
        super()._finish(claim, score)
        trial = self._queue.trials().since(claim.number)[0]
        quality = score.quality
        if trial.reused_from is not None or quality is None or trial.architecture is None:
            return
        self._history.append(
            Scored(
                seconds=self._clock.now,
                architecture_id=(trial.trained or trial.architecture).id,
                runs=len(quality.validation_loss.by_seed) or 1,
                spent=self._table_scorer.spent,
                observed=tuple(map(score.value, self._settings.objectives)),
                is_feasible=not trial.infeasible,
            )
        )


def _refuse(line: str) -> None:
    """Fail on what a worker of a real study would log and survive."""
    raise SystemError(line)


def _known_numbers(table: BenchmarkTable, config: StudyConfig, space: Space) -> dict[str, dict[str, float]]:
    """Costs of the space's architectures by id, and their latencies if they are predicted."""
    device = config.latency.device
    numbers = {}
    for arch_id, entry in entries_by_id(table, space).items():
        numbers[arch_id] = known_numbers(cost_of(entry, space), None)
        if device.startswith(PREDICTED):
            numbers[arch_id]["latency_ms"] = latency_of(entry, space, device)
    return numbers


def true_points(table: BenchmarkTable, config: StudyConfig) -> dict[str, tuple[float, ...]]:
    """Values of a study's objectives of every architecture that did not diverge and meets its limits, by id.

    Quality is the mean over the table's seeds, and so still has some of their noise.

    Raises:
        InputError: if there is none.
    """
    space = space_on(table, config)
    limits = upper_bounds(config, space)
    values: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys((*config.objectives, *limits)):
        for arch_id, value in _values(table, config, space, name).items():
            values.setdefault(arch_id, {})[name] = value
    points = {
        arch_id: tuple(found[name] for name in config.objectives)
        for arch_id, found in values.items()
        if found.keys() >= {*config.objectives, *limits} and all(found[n] <= bound for n, bound in limits.items())
    }
    if not points:
        problem = f"leave none of the {len(table.entries)} architectures of {table.source}"
        raise InputError(config.source, problem, f"raise those of the study or of {space.name}", place="constraints")
    return points


def _values(table: BenchmarkTable, config: StudyConfig, space: Space, name: str) -> dict[str, float]:
    if name == "latency_ms":
        return {arch_id: latency_of(e, space, config.latency.device) for arch_id, e in table.entries.items()}
    if name in COSTS:
        return {arch_id: float(getattr(cost_of(e, space), name)) for arch_id, e in table.entries.items()}
    return table.true_values(name)
