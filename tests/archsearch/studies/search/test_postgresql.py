"""The same search on PostgreSQL, with a server of our own where one is installed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer
from tests.archsearch.studies.search.test_run import numbers, run_in, scored, until

Make = Callable[..., StudyConfig]


def test_same_candidates_as_on_sqlite(settings: Make, server: str) -> None:
    here = load_candidates(
        search(settings(name="here", trials=5, constraints={"latency_ms": 20}), quiet=True, scorer=QuickScorer)
    )
    there = settings(name="there", trials=5, constraints={"latency_ms": 20}, storage=server)
    assert [c.score for c in load_candidates(search(there, quiet=True, scorer=QuickScorer))] == [c.score for c in here]


def test_two_processes_and_a_kill(
    settings: Make, server: str, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    shared = settings(name="shared", trials=10, storage=server)
    both = [start(run_in, tmp_path, shared, {"QUICK_SECONDS": "0.1"}) for _ in range(2)]
    until(lambda: len(numbers(shared, "COMPLETE")) >= 3)
    assert both[0].pid is not None
    os.kill(both[0].pid, signal.SIGKILL)
    both[1].join()
    assert both[1].exitcode == 0
    trials = load_study(shared).get_trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    candidates = load_candidates(load_study(shared))
    assert len(scored(candidates)) == 10
    assert len({c.architecture.id for c in scored(candidates)}) == 10


@pytest.mark.slow
def test_thirty_two_workers_of_which_some_are_killed(
    settings: Make, server: str, start: Callable[..., BaseProcess], tmp_path: Path
) -> None:
    """None is lost and none is scored twice, whichever worker dies when."""
    many, log, rng = (
        settings(
            name="many", trials=240, storage=server, sampler="random", seed=5
        ),  # no score of another test is reused
        tmp_path / "log",
        random.Random(2),
    )
    environment = {"QUICK_SECONDS": "0.2", "QUICK_LOG": str(log)}
    workers = [start(run_in, tmp_path, many, environment) for _ in range(32)]
    until(lambda: len(numbers(many, "COMPLETE")) >= 10, seconds=300)
    victims = rng.sample(workers, 12)
    for victim in victims:
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(rng.uniform(0, 1.5))
    for worker in workers:
        worker.join()
    assert Counter(worker.exitcode for worker in workers) == {0: 20, -signal.SIGKILL: 12}
    study = load_study(many)
    trials = study.get_trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    assert {t.state.name for t in trials} == {"COMPLETE", "FAIL"}
    candidates = load_candidates(study)
    assert [c.slot for c in candidates] == list(range(len(candidates)))
    assert {c.state for c in candidates} == {"scored"}
    assert sum(t.state.name == "COMPLETE" for t in trials) == len(candidates)
    ids = [c.architecture.id for c in scored(candidates)]
    assert len(ids) == len(set(ids)) == 240
    # A worker may die between its training's end and that of its trial, which is then trained again.
    trained = Counter(log.read_text().split())
    assert set(ids) <= set(trained)
    assert sum(trained.values()) - len(trained) <= len(victims)
    # On a busy machine a worker may die before its first trial.
    assert len({t.user_attrs["worker"]["pid"] for t in trials}) >= 20


def test_a_database_that_is_not_there(settings: Make, server: str) -> None:
    with pytest.raises(InputError, match=r'database "none" does not exist'):
        search(settings(storage=server.removesuffix("postgres") + "none"), quiet=True, scorer=QuickScorer)
