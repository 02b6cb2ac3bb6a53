"""Who works on a trial: processes of different machines, containers and boots are different, whatever their pids."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from archsearch.score import Quality
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage import leases
from archsearch.studies.storage.database import GRACE_SECONDS, load_study
from archsearch.studies.storage.leases import is_dead, worker_identity
from archsearch.studies.storage.record import TrialRecord
from snapgen.architecture.schema import Architecture
from tests.archsearch.studies.quick import QuickScorer
from tests.archsearch.studies.search.test_run import scored

Make = Callable[..., StudyConfig]


def test_a_process_that_lives_and_one_that_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = worker_identity(process.pid)
    assert not is_dead(identity)
    assert not is_dead(worker_identity())
    process.kill()
    deadline = time.monotonic() + 10
    while not is_dead(identity) and time.monotonic() < deadline:  # a zombie, before anybody waits for it
        time.sleep(0.01)
    assert is_dead(identity)
    process.communicate()
    assert is_dead(identity)


def test_a_pid_that_is_used_again_is_another_process() -> None:
    me = worker_identity()
    assert is_dead(me.model_copy(update={"started": me.started - 100}))


def test_a_step_of_the_clock_makes_nobody_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    me = worker_identity()
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted + 3600)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert not is_dead(me)


@pytest.mark.parametrize("which", ["BOOT_ID", "PID_NAMESPACE"])
def test_another_boot_or_container_is_another_host(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = worker_identity()
    other = tmp_path / "other"
    if which == "BOOT_ID":
        other.write_text("0f6d1a9c\n")
    else:
        other.symlink_to("pid:[1]")
    monkeypatch.setattr(leases, which, other)
    there = worker_identity()
    assert (there.pid, there.started) == (me.pid, me.started)
    assert there.host != me.host
    assert not is_dead(me.model_copy(update={"pid": 2**22 - 1}))


def test_the_first_processes_of_two_containers_are_different() -> None:
    tell = "from archsearch.studies.storage.leases import worker_identity as me; print(me().model_dump_json())"
    container = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", tell]
    both = [subprocess.Popen(container, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    told = [run.communicate()[0] for run in both]
    if any(run.returncode for run in both):
        pytest.skip("making containers is not allowed here")
    one, other = map(json.loads, told)
    assert one["pid"] == other["pid"] == 1
    assert one["host"] != worker_identity().host
    assert (one["host"], one["started"]) != (other["host"], other["started"])


class Dying(QuickScorer):
    """The first worker dies; another container's worker has its pid."""

    def quality(self, arch: Architecture, **more: Any) -> Quality:
        with contextlib.suppress(FileExistsError), Path("one-died").open("x"):  # the workers begin at the same time
            study = load_study(self.settings)
            other = worker_identity().model_copy(update={"host": "container"})
            leases.send_heartbeat(study._storage, TrialRecord.create(study, "RUNNING", worker=other))
            os._exit(9)
        return super().quality(arch, **more)


@pytest.mark.slow
def test_a_death_costs_the_worker_of_another_container_nothing(settings: Make) -> None:
    """It is given up when it has sent no heartbeat for the time of grace, as it never does here, and not before."""
    candidates = load_candidates(search(settings(trials=3, workers=2), quiet=True, scorer=Dying))
    assert len(scored(candidates)) == 3
    trials = load_study(settings()).get_trials()
    [theirs] = [t for t in trials if t.user_attrs["worker"]["host"] == "container"]
    assert theirs.duration is not None
    assert theirs.duration >= timedelta(seconds=GRACE_SECONDS)
    assert "error" not in theirs.user_attrs
    # Two workers may claim one slot at once: one of them gives its claim back. Either the search or the other worker
    # sees the death first, and only the search names it.
    ended = [t for t in trials if t.state.name == "FAIL" and not {"lost", "withdrawn"} & t.user_attrs.keys()]
    assert theirs in ended
    [died] = [t for t in ended if t is not theirs]
    assert died.user_attrs.get("error") in ("its worker died (status 9)", None)
