"""A database that is away for a while costs no training and no trial, and one that stays away ends in one line."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage import database, leases
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.leases import SilenceWatch, heartbeat
from archsearch.studies.storage.outages import patience
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.errors import InputError
from tests.archsearch.studies.postgresql import Server, or_skipped
from tests.archsearch.studies.quick import QuickScorer
from tests.archsearch.studies.search.test_run import numbers, run_in, scored, until

Make = Callable[..., StudyConfig]
Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    with or_skipped() as server:
        yield server


def all_scored_at_once(settings: StudyConfig, log: Path, trials: int) -> None:
    """Every candidate was trained once, and no trial failed."""
    study = load_study(settings)
    assert {t.state.name for t in study.get_trials()} == {"COMPLETE"}
    candidates = load_candidates(study)
    assert len(scored(candidates)) == trials
    trained = log.read_text().split()
    assert len(trained) == len(set(trained)) == trials


@pytest.mark.slow
def test_a_server_that_restarts_twice(settings: Make, own_server: Server, start: Start, tmp_path: Path) -> None:
    chosen = settings(name="restarts", trials=12, storage=own_server.url, sampler="random")
    log = tmp_path / "log"
    both = [start(run_in, tmp_path, chosen, {"QUICK_SECONDS": "0.3", "QUICK_LOG": str(log)}) for _ in range(2)]
    for scored_by_then, how in ((2, signal.SIGINT), (6, signal.SIGQUIT)):
        until(functools.partial(lambda least: len(numbers(chosen, "COMPLETE")) >= least, scored_by_then))
        own_server.stop(how)
        time.sleep(2)
        own_server.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    all_scored_at_once(chosen, log, 12)


@pytest.mark.slow
def test_a_server_that_restarts_below_a_pool_of_workers(
    settings: Make, own_server: Server, start: Start, tmp_path: Path
) -> None:
    chosen = settings(name="pool", seed=5, trials=12, storage=own_server.url, sampler="random", workers=2)
    log = tmp_path / "log"
    process = start(run_in, tmp_path, chosen, {"QUICK_SECONDS": "0.5", "QUICK_LOG": str(log)})
    until(lambda: len(numbers(chosen, "COMPLETE")) >= 2)
    own_server.stop()
    time.sleep(3)
    own_server.start()
    process.join()
    assert process.exitcode == 0
    all_scored_at_once(chosen, log, 12)


def test_a_server_that_stays_away(settings: Make, own_server: Server) -> None:
    class Stopping(QuickScorer):
        def cost(self, arch):  # type: ignore[no-untyped-def]
            own_server.stop()
            return super().cost(arch)

    chosen = settings(name="away", seed=6, storage=own_server.url)
    try:
        with patience(0.5), pytest.raises(InputError, match=r"onnect.*; check the URL and that the server runs"):
            search(chosen, quiet=True, scorer=Stopping)
    finally:
        own_server.start()
    assert len(scored(load_candidates(search(chosen, quiet=True, scorer=QuickScorer)))) == 8


def test_a_note_of_progress_costs_no_training(settings: Make, own_server: Server) -> None:
    class Interrupted(QuickScorer):
        def quality(self, arch, *, progress, **more):  # type: ignore[no-untyped-def]
            own_server.stop()
            began = time.monotonic()
            progress(0.5, "on the way")
            assert time.monotonic() - began < 5
            own_server.start()
            return super().quality(arch, progress=progress, **more)

    chosen = settings(name="notes", seed=7, storage=own_server.url, trials=1)
    candidates = load_candidates(search(chosen, quiet=True, scorer=Interrupted))
    assert [(c.state, c.attempts) for c in candidates] == [("scored", 1)]


def test_a_heart_beats_on_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = optuna.storages.RDBStorage("sqlite:///:memory:", heartbeat_interval=1)
    beats: list[int] = []
    enough = threading.Event()

    def beat(*_: object) -> None:
        beats.append(len(beats))
        if len(beats) in (2, 3):
            raise sqlalchemy.exc.OperationalError("", {}, Exception("server closed the connection"))
        if len(beats) == 4:
            enough.set()

    monkeypatch.setattr(leases, "send_heartbeat", beat)
    monkeypatch.setattr(storage, "heartbeat_interval", 0.02)
    with heartbeat(storage, 0):
        assert enough.wait(10)


def test_nobody_is_taken_for_dead_after_an_outage(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heartbeats are old when the database is back; whoever reads first must give the others time to beat."""
    monkeypatch.setattr(database, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(database, "GRACE_SECONDS", 1)
    chosen = settings(trials=4)
    study = search(settings(trials=1), quiet=True, scorer=QuickScorer)
    elsewhere = {"host": "elsewhere", "pid": 1, "started": 0.0}
    with monkeypatch.context() as patched:
        patched.setattr("archsearch.studies.storage.trial_queue.worker_identity", lambda: elsewhere)
        claim = TrialQueue(study, chosen).claim()
    assert isinstance(claim, TrialRecord)
    time.sleep(2.5)  # the outage
    reader = TrialQueue(load_study(chosen), chosen)
    monkeypatch.setattr(leases, "WATCHED_INTERVALS", 1)
    assert claim.number in reader.reap_dead().running
    leases.send_heartbeat(study._storage, claim.trial_id)
    time.sleep(0.5)
    assert claim.number in reader.reap_dead().running
    time.sleep(2.5)
    reader.reap_dead()
    time.sleep(1.1)
    assert claim.number not in reader.reap_dead().running


def test_a_worker_that_died_before_its_first_heartbeat(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    study = search(settings(trials=1), quiet=True, scorer=QuickScorer)
    trial_id = TrialRecord.create(study, "RUNNING", worker={"host": "elsewhere", "pid": 1})
    monkeypatch.setattr(leases, "WATCHED_INTERVALS", 0)
    assert SilenceWatch(study._storage, study._study_id).silent() == {trial_id}


def test_an_answer_that_was_lost(settings: Make, own_server: Server) -> None:
    """The server did what it was asked, and its answer did not arrive: it is asked again, and nothing is done twice."""
    chosen = settings(name="answers", seed=8, storage=own_server.url, trials=6, sampler="random")

    original, calls = optuna.storages.RDBStorage.set_trial_state_values, list[Any]()
    created = optuna.storages.RDBStorage._create_new_trial

    def lose(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done = real(*arguments, **named)
            calls.append(done)
            if len(calls) % 3 == 1:
                raise sqlalchemy.exc.OperationalError("", {}, ConnectionError("server closed the connection"))
            return done

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optuna.storages.RDBStorage, "set_trial_state_values", lose(original))
        patched.setattr(optuna.storages.RDBStorage, "_create_new_trial", lose(created))
        study = search(chosen, quiet=True, scorer=QuickScorer)
    assert len(calls) > 12
    candidates = load_candidates(study)
    assert {c.state for c in candidates} == {"scored"}
    assert len(scored(candidates)) == len({c.id for c in scored(candidates)}) == 6
    assert not [t for t in study.get_trials() if t.state.name == "RUNNING"]


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
@pytest.mark.parametrize("moment", ["cost", "latency", "quality"])
def test_a_study_deleted_while_it_is_searched(settings: Make, own_server: Server, where: str, moment: str) -> None:
    # Another seed each, so that no quality is known from another study of the server.
    storage = {"storage": own_server.url} if where == "postgresql" else {}
    chosen = settings(name=f"deleted-{moment}", seed=ord(moment[0]), **storage)

    class Deleting(QuickScorer):
        def __getattribute__(self, name: str):  # type: ignore[no-untyped-def]
            if name == moment:
                with contextlib.suppress(KeyError):
                    optuna.delete_study(study_name=chosen.name, storage=chosen.url)
            return super().__getattribute__(name)

    with pytest.raises(InputError, match="was deleted while it was in use; begin it again"):
        search(chosen, quiet=True, scorer=Deleting)
    assert len(scored(load_candidates(search(chosen, quiet=True, scorer=QuickScorer)))) == 8


def test_a_worker_that_is_stopped_within_its_claim(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others took it for dead and ended its trial before it had written a thing."""
    chosen = settings(trials=4)
    queue = TrialQueue(search(settings(trials=1), quiet=True, scorer=QuickScorer), chosen)
    ended: list[int] = []
    beat = leases.send_heartbeat

    def stopped(storage: Any, trial_id: int) -> None:
        beat(storage, trial_id)
        if not ended:
            ended.append(trial_id)

    write = TrialQueue.write

    def late(self: TrialQueue, trial_id: int, **fields: Any) -> None:
        if trial_id in ended:
            TrialRecord.end(self._storage, trial_id)
        write(self, trial_id, **fields)

    monkeypatch.setattr("archsearch.studies.storage.trial_queue.send_heartbeat", stopped)
    monkeypatch.setattr(TrialQueue, "write", late)
    claim = queue.claim()
    assert isinstance(claim, TrialRecord)
    assert claim.trial_id not in ended
    assert len(ended) == 1
