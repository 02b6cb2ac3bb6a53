"""Two commands, or two studies, that write in one folder at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from archsearch.reports.study_report import write_report
from archsearch.score import Quality
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import TrialRecord
from snapgen.architecture.schema import Architecture
from snapgen.io.atomic import STALE_SECONDS, atomic_write
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


def test_two_reports_at_once(settings: Make, tmp_path: Path) -> None:
    study = search(settings(trials=3), quiet=True, scorer=QuickScorer)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(3):
                write_report(study, tmp_path / "out" / "report.html")
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=write) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert errors == []
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.is_file()) == [".csv", ".html", ".md"]


def test_a_file_that_two_write_at_once_and_what_a_killed_one_left(tmp_path: Path) -> None:
    path, left, foreign = tmp_path / "a.csv", tmp_path / "a.csv.1-abababab.part", tmp_path / "b.csv.1-abababab.part"
    for old in (left, foreign):
        old.touch()
        os.utime(old, (0, old.stat().st_mtime - STALE_SECONDS - 60))
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to end
    assert sorted(tmp_path.iterdir()) == [path, foreign]


class Listing(QuickScorer):
    """Writes down the folders that it is given, and in a second storage's study looks for the first one's files."""

    folders: ClassVar[list[Path]] = []

    def quality(self, arch: Architecture, *, artifacts: Path, **more: Any) -> Quality:
        assert not [path for path in artifacts.iterdir() if path.name != "checkpoints"]
        self.folders.append(artifacts)
        return super().quality(arch, artifacts=artifacts, **more)


def test_studies_of_one_name_in_two_storages(settings: Make, tmp_path: Path) -> None:
    Listing.folders = []
    for name in ("one", "other"):
        search(settings(trials=2, storage=f"sqlite:///{tmp_path / name}.db"), quiet=True, scorer=Listing)
    assert len(set(Listing.folders)) == 4


def test_a_trial_takes_over_what_the_one_before_left(settings: Make) -> None:
    class Stopped(QuickScorer):
        def quality(self, arch: Architecture, *, artifacts: Path, **more: Any) -> Quality:
            kept = artifacts / "checkpoints" / "0.safetensors"
            if not kept.exists():
                kept.parent.mkdir()
                kept.write_text("half of the steps")
                raise KeyboardInterrupt
            assert kept.read_text() == "half of the steps"
            kept.unlink()
            return super().quality(arch, artifacts=artifacts, **more)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(settings(trials=2), quiet=True, scorer=Stopped)
    assert [c.state for c in load_candidates(load_study(settings()))] == ["scored", "failed"]


def test_a_worker_that_was_taken_for_dead_disturbs_nobody(settings: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """It was stopped, and its trial taken over with its folder; when it goes on, the trial is another's."""

    class Slow(QuickScorer):
        def quality(self, arch: Architecture, *, artifacts: Path, **more: Any) -> Quality:
            if not (study := load_study(self.settings)).get_trials()[0].state.is_finished():
                TrialRecord.end(study._storage, study.get_trials()[0]._trial_id)
                artifacts.rename(artifacts.with_name(artifacts.name.replace("-0-0", "-0-1")))
            return super().quality(arch, artifacts=artifacts, **more)

    study = search(settings(trials=2), quiet=True, scorer=Slow)
    assert [c.state for c in load_candidates(study)] == ["scored", "scored"]
    assert not [t for t in study.get_trials() if "error" in t.user_attrs]
    assert "trial 0: taken over by another worker" in capfd.readouterr().err
