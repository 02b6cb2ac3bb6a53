"""What is kept of a study's trials from read to read is what a first read finds, whatever happens in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest

from archsearch.score import Cost, Score
from archsearch.studies.storage.database import open_storage
from archsearch.studies.storage.leases import worker_identity
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.study_trials import MAX_FAILURES, BusyTime, StudyTrials
from snapgen.architecture.presets import preset

SCORE = Score(cost=Cost(params=1, macs=2, activation_bytes=3))


class Life:
    """Things that happen to a study, one after the other."""

    def __init__(self, seed: int) -> None:
        self.study, self.rng = optuna.create_study(), random.Random(seed)
        self.first_of_slot: list[int] = []

    def happen(self) -> None:
        running = [t for t in self.study.get_trials() if t.state.name == "RUNNING"]
        actions: list[Callable[[], Any]] = [self.create, self.retry, self.add_by_hand]
        if running:
            trial = self.rng.choice(running)._trial_id
            actions += [lambda: self.propose(trial), lambda: self.end(trial), lambda: self.end(trial)]
        self.rng.choice(actions)()

    def create(self) -> None:
        self.first_of_slot.append(len(self.study.get_trials()))
        TrialRecord.create(self.study, "RUNNING", worker=worker_identity())

    def retry(self) -> None:
        if self.first_of_slot:
            retried = self.rng.choice(self.first_of_slot)
            TrialRecord.create(self.study, "RUNNING", worker=worker_identity(), retry_of=retried)

    def add_by_hand(self) -> None:
        self.study.add_trial(optuna.trial.create_trial(value=1.0))

    def propose(self, trial_id: int) -> None:
        TrialRecord.write(self.study._storage, trial_id, architecture_id=self.rng.choice("abc"))

    def end(self, trial_id: int) -> None:
        storage = self.study._storage
        fields = self.rng.choice([{"error": "boom"}, {"rejected": True}, {"withdrawn": True}, {}, {}])
        if fields:
            TrialRecord.end(storage, trial_id, **fields)
            return
        reused = {"reused_from": 0} if self.rng.random() < 0.3 else {}
        arch = preset("snapgen-emoji")
        TrialRecord.write(storage, trial_id, architecture_id="d", architecture=arch, score=SCORE, **reused)
        if self.rng.random() < 0.3:
            storage.set_trial_state_values(trial_id, optuna.trial.TrialState.PRUNED)
        else:
            TrialRecord.end(storage, trial_id, [1.0])


def told(trials: StudyTrials) -> dict[str, Any]:
    """All that is kept, but for the order of what has ended."""
    kept = {name: getattr(trials, name) for name in ("by_slot", "active", "open_slots", "scored", "running")}
    kept |= {"candidates": trials.candidates(), "continued": trials.continued()}
    ended = sorted(t.number for t in trials.ended)
    return {**kept, "all": list(trials), "ended": ended, **{i: trials.of_architecture(i) for i in "abcd"}}


@pytest.mark.parametrize("seed", range(12))
def test_kept_trials_are_those_of_a_first_read(seed: int) -> None:
    life = Life(seed)
    kept = StudyTrials(life.study)
    for _ in range(120):
        life.happen()
        if life.rng.random() < 0.4:
            fresh = StudyTrials(life.study).read()
            assert told(kept.read()) == told(fresh)
            assert kept.median_seconds() == fresh.median_seconds()
    check(kept.read())


def check(trials: StudyTrials) -> None:
    """Compare with what every name means."""
    assert [t.number for t in trials] == sorted(t.number for t in trials)
    assert list(trials.by_slot) == list(range(len(trials.by_slot)))
    assert sorted(t.number for attempts in trials.by_slot.values() for t in attempts) == [t.number for t in trials]
    for slot, attempts in trials.by_slot.items():
        assert [t.number for t in attempts] == [t.number for t in trials if t.slot == slot]
        assert {t.retry_of for t in attempts[1:]} <= {attempts[0].number}
        alive = [t for t in attempts if t.state != "failed"]
        assert trials.active.get(slot) == (alive[0] if alive else None)
        given_up = any(t.rejected for t in attempts) or sum(t.error is not None for t in attempts) >= MAX_FAILURES
        assert (slot in trials.open_slots) == (not alive and not given_up)
    assert set(trials.running) == {t.number for t in trials if t.state == "running"}
    assert set(trials.running) | {t.number for t in trials.ended} == {t.number for t in trials}
    assert {slot for slot, t in trials.active.items() if t.uses_budget} == set(trials.scored)
    middle = trials[len(trials) // 2].number
    assert trials.since(middle) == [t for t in trials if t.number >= middle]
    for architecture_id in "abcd":
        assert trials.of_architecture(architecture_id) == [t for t in trials if t.architecture_id == architecture_id]


@pytest.mark.parametrize("seed", range(20))
def test_busy_time_is_that_of_all_intervals_at_once(seed: int) -> None:
    rng, now, busy = random.Random(seed), datetime.now(), BusyTime()
    seconds: set[int] = set()
    for _ in range(40):
        start = rng.randrange(2, 900)
        stop = start + rng.choice([0, 1, 5, 60])
        busy.add(now - timedelta(seconds=1000 - start), now - timedelta(seconds=1000 - stop))
        seconds |= set(range(start, stop))
        assert busy.seconds() == pytest.approx(len(seconds))
        since = rng.randrange(1, 1000)
        expected = len(seconds | set(range(since, 1000)))
        assert busy.seconds([now - timedelta(seconds=1000 - since), now]) == pytest.approx(expected, abs=0.5)
    assert all(a[1] < b[0] for a, b in pairwise(busy._pieces))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_claim_at_once_agree_on_every_slot(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each view, read at other moments, never misses a trial that was numbered before one that it has seen."""
    url = f"sqlite:///{tmp_path / 'study.db'}" if kind == "sqlite" else request.getfixturevalue("server")
    optuna.create_study(study_name="slots", storage=open_storage(url))
    views: list[dict[int, int]] = []
    errors: list[BaseException] = []

    def claim(rng: random.Random) -> None:
        try:
            study = optuna.load_study(study_name="slots", storage=open_storage(url))
            trials, slots = StudyTrials(study), dict[int, int]()
            for _ in range(12):
                first = [attempts[0].number for attempts in trials.by_slot.values()]
                retried = {"retry_of": rng.choice(first)} if first and rng.random() < 0.3 else {}
                TrialRecord.create(study, "RUNNING", worker=worker_identity(), **retried)
                trials.read()
                assert [t.number for t in trials] == list(range(len(trials)))
                assert all(trials[number].slot == slot for number, slot in slots.items())
                slots.update({t.number: t.slot for t in trials})
            views.append(slots)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=claim, args=(random.Random(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    everything = max(views, key=len)
    assert len(everything) == 72
    assert all(view.items() <= everything.items() for view in views)
