"""The benchmark of large studies, on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from archsearch.studies.search.known_costs import KnownCosts
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.study_trials import StudyTrials
from benchmarks.scale import STEPS, begin, fill, formula_numbers, one_more


def test_every_step_of_one_more_trial_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(KnownCosts, "_count", formula_numbers)
    settings, space = begin(f"sqlite:///{tmp_path / 'study.db'}", "ehvi")
    fill(settings, space, 40)
    trials = StudyTrials(load_study(settings)).read()
    assert len(trials) == 40
    assert {c.runs for c in trials.candidates() if c.state == "scored"} == {1, 2}
    took = one_more(settings, space, repeats=6)
    assert took.keys() >= set(STEPS)
    assert all(took[step] > 0 for step in STEPS)
