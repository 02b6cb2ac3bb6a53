"""A search that dies and is started again ends as one that never died."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import Candidate
from tests.archsearch.studies.quick import QuickScorer

Start = Callable[..., BaseProcess]
Make = Callable[..., StudyConfig]


def run(settings: StudyConfig, folder: Path, seconds: float = 0.0) -> None:
    os.chdir(folder)
    os.environ["QUICK_SECONDS"] = str(seconds)
    search(settings, quiet=True, scorer=QuickScorer)


def run_until_write(settings: StudyConfig, folder: Path, last: int) -> None:
    """Die of SIGKILL at the so many-th write to the storage: before it, or after it, by turns."""
    from optuna.storages import RDBStorage

    writes = 0

    def mortal(original: Any) -> Any:
        def write(*arguments: Any, **named: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == last and last % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if writes == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return write

    for name in ("_create_new_trial", "set_trial_user_attr", "set_trial_system_attr", "_set_trial_param"):
        setattr(RDBStorage, name, mortal(getattr(RDBStorage, name)))
    RDBStorage.set_trial_state_values = mortal(RDBStorage.set_trial_state_values)  # type: ignore[method-assign]
    run(settings, folder)


def outcome(candidates: list[Candidate]) -> list[tuple[Any, ...]]:
    slot_of = {c.number: c.slot for c in candidates}
    return [
        (
            c.slot,
            c.name,
            c.state,
            c.point,
            c.architecture.id,
            c.score.model_dump_json(),
            None if c.reused_from is None else slot_of[c.reused_from],
            sorted(c.artifacts),
            [(r.step, r.quality.model_dump_json()) for r in c.rungs],
        )
        for c in candidates
    ]


def of(settings: StudyConfig) -> list[tuple[Any, ...]]:
    return outcome(load_candidates(load_study(settings)))


def complete_numbers(settings: StudyConfig) -> list[int]:
    return [t.number for t in load_study(settings).get_trials() if t.state.name in ("COMPLETE", "PRUNED")]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "qmc"])
def test_same_candidates_after_an_interruption(settings: Make, sampler: str) -> None:
    whole = settings(name="whole", sampler=sampler, trials=12, constraints={"latency_ms": 20})
    search(whole, quiet=True, scorer=QuickScorer)
    for trials in (5, 9, 12):
        part = settings(name="parts", sampler=sampler, trials=trials, constraints={"latency_ms": 20})
        search(part, quiet=True, scorer=QuickScorer)
    assert of(whole) == of(settings(name="parts"))
    assert sum(c.state == "scored" and c.reused_from is None for c in load_candidates(load_study(whole))) == 12


SEEDS = {"seeds": {"first": 1, "front": 3}, "protocol": {"train_seeds": [0, 1, 2]}}
RUNGS = {**SEEDS, "rungs": {"steps": [30, 80]}, "trials": 20}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="seeds-for-all", marks=pytest.mark.slow),
        pytest.param(SEEDS, id="seeds-for-the-front", marks=pytest.mark.slow),
        pytest.param(RUNGS, id="rungs", marks=pytest.mark.slow),
    ],
)
def test_killed_at_twenty_random_moments(settings: Make, start: Start, tmp_path: Path, more: dict[str, Any]) -> None:
    changes = {"trials": 14, "sampler": "tpe", "constraints": {"latency_ms": 20.0}, **more}
    whole, killed = settings(name="whole", **changes), [settings(name="killed-0", **changes)]
    reference = start(run, whole, tmp_path, 0.02)
    rng, kills = random.Random(5), 0
    while kills < 20:
        process = start(run, killed[-1], tmp_path, 0.02)
        process.join(rng.uniform(0.05, 1.2))
        if process.exitcode is not None:  # too late: this study is finished; another one for the rest
            assert process.exitcode == 0
            killed.append(settings(name=f"killed-{len(killed)}", **changes))
            continue
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    last = start(run, killed[-1], tmp_path, 0.0)
    last.join()
    reference.join()
    assert (last.exitcode, reference.exitcode) == (0, 0)
    assert [of(study) for study in killed] == [of(whole)] * len(killed)


@pytest.mark.slow
def test_killed_at_every_write_of_the_first_trials(settings: Make, start: Start, tmp_path: Path) -> None:
    changes = {"trials": 4, "sampler": "random", "constraints": {"latency_ms": 20.0}}
    whole, killed = settings(name="whole", **changes), settings(name="killed", **changes)
    search(whole, quiet=True, scorer=QuickScorer)
    died = 0
    for write in range(1, 60):
        process = start(run_until_write, killed, tmp_path, write)
        process.join()
        died += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert died > 25
    assert of(whole) == of(killed)
    assert len(complete_numbers(killed)) == len(of(killed))
