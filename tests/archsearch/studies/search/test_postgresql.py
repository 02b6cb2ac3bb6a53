"""The same search on PostgreSQL, with a server of our own where one is installed."""

from __future__ import annotations

import os
import signal
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


def test_a_database_that_is_not_there(settings: Make, server: str) -> None:
    with pytest.raises(InputError, match=r'database "none" does not exist'):
        search(settings(storage=server.removesuffix("postgres") + "none"), quiet=True, scorer=QuickScorer)
