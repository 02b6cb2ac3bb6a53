"""A full disk, too many files or a read-only folder ends a study in one line, and costs no candidate anything."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archsearch.latency.host import HostBackend, HostConfig
from archsearch.machine_faults import MachineFault
from archsearch.score import LatencyRecord, Quality
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote import server
from archsearch.studies.remote.queue import MeasurementQueue, MeasurementSpec
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import retry_given_up, search
from archsearch.studies.storage.database import load_study, open_storage
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.storage.study_trials import MAX_KILLED
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.faults.disks import disk, fill, remount
from tests.archsearch.studies.quick import QuickScorer, quick_cost

Make = Callable[..., StudyConfig]


def check_nothing_was_charged(settings: StudyConfig) -> list[Candidate]:
    """Search to the end, now that the machine is mended."""
    candidates = load_candidates(search(settings, quiet=True, scorer=QuickScorer))
    assert [c.name for c in candidates[:2]] == ["base", "thin"]
    assert {c.state for c in candidates} == {"scored"}
    assert not [t for t in load_study(settings).get_trials() if "error" in t.user_attrs]
    return candidates


class HostTimed(QuickScorer):
    """Times nets on this machine, by way of the temporary folder."""

    def latency(self, arch: Architecture) -> LatencyRecord:
        return HostBackend(HostConfig()).measure(arch, 8, 16)


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder without space; the file in it that takes all."""
    with disk(tmp_path / "tmp", kilobytes=1 << 15) as place:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        yield fill(place)


@pytest.mark.slow
def test_a_full_temporary_folder(settings: Make, full: Path) -> None:
    with pytest.raises(MachineFault, match="no space left on device; free disk space"):
        search(settings(trials=3), quiet=True, scorer=HostTimed)
    full.unlink()
    check_nothing_was_charged(settings(trials=3))


def test_a_full_temporary_folder_of_a_device(settings: Make, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.01)
    url, spec = f"sqlite:///{full.parents[1] / 'queue.db'}", MeasurementSpec("host", 8, 16, {})
    queue, arch = MeasurementQueue(open_storage(url), spec), settings().load_space().base
    queue.request(arch)

    def serve() -> int:
        return server.serve(url, "host", {}, log=lambda _: None, idle_seconds=0.1)

    with pytest.raises(MachineFault, match="no space left on device"):
        serve()
    assert queue.answer(arch) is None
    full.unlink()
    assert serve() == 1
    assert queue.answer(arch) is not None


@pytest.mark.parametrize("folder", ["runs/quick", "runs/quick/artifacts"])
def test_a_full_disk_of_the_run_or_its_artifacts(settings: Make, tmp_path: Path, folder: str) -> None:
    class Filling(QuickScorer):
        def quality(self, arch: Architecture, **more: Any) -> Quality:
            if quick_cost(arch).params == quick_cost(self.space.base).params:
                fill(place)
            return super().quality(arch, **more)

    with disk(tmp_path / folder, kilobytes=4096) as place:
        with pytest.raises(InputError, match=r"no space left|full|unable to open"):
            search(settings(trials=3), quiet=True, scorer=Filling)
        (place / "filler").unlink()
        check_nothing_was_charged(settings(trials=3))


def test_read_only_artifacts(settings: Make, tmp_path: Path) -> None:
    class Protecting(QuickScorer):
        def quality(self, arch: Architecture, **more: Any) -> Quality:
            remount(place, "ro")
            return super().quality(arch, **more)

    with disk(tmp_path / "runs/quick/artifacts") as place:
        with pytest.raises(MachineFault, match="read-only file system; make it writable"):
            search(settings(trials=3), quiet=True, scorer=Protecting)
        remount(place, "rw")
        check_nothing_was_charged(settings(trials=3))


def test_a_file_in_the_place_of_the_artifacts(settings: Make) -> None:
    class Replacing(QuickScorer):
        def quality(self, arch: Architecture, **more: Any) -> Quality:
            folder.rmdir()
            folder.touch()
            return super().quality(arch, **more)

    folder = settings().artifact_folder
    with pytest.raises(InputError, match=r"is not a directory|not a directory|file exists"):
        search(settings(trials=3), quiet=True, scorer=Replacing)
    folder.unlink()
    check_nothing_was_charged(settings(trials=3))


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class FewFiles(QuickScorer):
    def quality(self, arch: Architecture, **more: Any) -> Quality:
        with no_more_files(), contextlib.ExitStack() as taken:
            for _ in range(10_000):  # those that the highest one leaves free
                taken.enter_context(Path(os.devnull).open())
        return super().quality(arch, **more)


def test_too_many_open_files(settings: Make) -> None:
    with pytest.raises(MachineFault, match="too many open files; close other programs"):
        search(settings(trials=3), quiet=True, scorer=FewFiles)
    check_nothing_was_charged(settings(trials=3))


class Starved(QuickScorer):
    def quality(self, *_: Any, **more: Any) -> Quality:  # noqa: ARG002
        raise MemoryError


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_that_others_hold(settings: Make, workers: int) -> None:
    with pytest.raises(InputError, match=r"out of memory .*; free memory, or use fewer workers"):
        search(settings(trials=3, workers=workers), quiet=True, scorer=Starved)
    check_nothing_was_charged(settings(trials=3))


def test_what_was_given_up_is_listed_and_tried_again(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = settings().load_space().base
    monkeypatch.setenv("QUICK_FAULT", f"{base.id}:raise")
    candidates = load_candidates(search(settings(trials=3, sampler="random"), quiet=True, scorer=QuickScorer))
    assert (candidates[0].name, candidates[0].state) == ("base", "failed")
    told = capfd.readouterr().err
    assert "quick: trial 1 (base) was given up: RuntimeError: out of memory" in told
    assert "the same command with --retry" in told
    monkeypatch.delenv("QUICK_FAULT")
    search(settings(trials=3, sampler="random"), quiet=True, scorer=QuickScorer)
    assert "was given up" in capfd.readouterr().err
    retry_given_up(settings(trials=3))
    again = load_candidates(search(settings(trials=3, sampler="random"), quiet=True, scorer=QuickScorer))
    assert [c.state for c in again] == ["scored"] * len(candidates)
    assert (again[0].name, again[0].attempts) == ("base", 3)
    assert capfd.readouterr().err == ""
    retry_given_up(settings(trials=3))
    assert len(load_study(settings()).get_trials()) == len(again) + 3  # two failures, and the one that reopened


def test_what_a_device_refused_is_asked_again(settings: Make) -> None:
    url, arch = settings().url, settings().load_space().base
    queue = MeasurementQueue(open_storage(url), MeasurementSpec("host", 8, 77, {}))
    queue.request(arch)
    claimed = queue.claim()
    assert claimed is not None
    queue.reject(claimed, "was out of battery")
    queue.request(arch)
    assert queue.claim() is None
    queue.reopen()
    queue.request(arch)
    assert queue.claim() is not None


def test_a_candidate_whose_workers_the_machine_kills_gets_more_attempts(settings: Make) -> None:
    chosen = settings(trials=1)
    study = search(settings(trials=1), quiet=True, scorer=QuickScorer)
    queue = TrialQueue(study, chosen.with_overrides(trials=2))
    slots = []
    for _ in range(MAX_KILLED):
        claim = queue.claim()
        assert isinstance(claim, TrialRecord)
        slots.append(claim.slot)
        queue.write(claim.trial_id, architecture=chosen.load_space().base)
        queue.fail(claim.trial_id, "its worker died (SIGKILL)", killed=True)
    assert slots == [1] * MAX_KILLED
    assert queue.trials().is_given_up(1)
    assert queue.reopen() == 1
    again = queue.claim()
    assert isinstance(again, TrialRecord)
    assert again.slot == 1
