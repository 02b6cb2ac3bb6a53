"""The lines of a search that is running."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search import run
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.display import Display
from archsearch.studies.search.run import search
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


def test_every_line_has_the_totals_as_of_its_own_trial(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    study = search(settings(trials=2), quiet=True, scorer=QuickScorer)
    whole = settings(trials=7)
    display = Display(study, whole, quiet=False)
    search(whole, quiet=True, scorer=QuickScorer)  # several have ended by the time that the display reads them
    display.tick(now=True)
    lines = re.findall(
        r"; (\d+) of 7 scored, best validation loss (\S+?)(?:,|$)", capsys.readouterr().err, re.MULTILINE
    )
    scored = [c for c in load_candidates(study) if c.state == "scored" and c.reused_from is None]
    losses = [c.value("validation_loss") for c in scored]
    assert lines == [(str(k), f"{min(losses[:k]):.4g}") for k in range(3, 8)]


def test_the_best_is_that_of_all_seeds_so_far(settings: Make, capsys: pytest.CaptureFixture[str]) -> None:
    seeds: dict[str, Any] = {"seeds": {"first": 1, "front": 3}, "protocol": {"train_seeds": [0, 1, 2]}}
    study = search(settings(trials=8, sampler="random", **seeds), quiet=False, scorer=QuickScorer)
    told = re.findall(r"best validation loss (\S+?)(?:,|$)", capsys.readouterr().err, re.MULTILINE)
    scored = [c for c in load_candidates(study) if c.state == "scored" and not c.infeasible]
    assert told[-1] == f"{min(c.value('validation_loss') for c in scored):.4g}"
    assert any(c.runs > 1 for c in scored)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_silent_minute_ends_with_the_state_and_the_time_left(
    settings: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    study = search(settings(trials=2), quiet=True, scorer=QuickScorer)
    display = Display(study, settings(trials=9), quiet=quiet)
    display.tick()
    assert capsys.readouterr().err == "", "nothing new, and no minute of silence"
    later = time.monotonic() + 61
    monkeypatch.setattr("archsearch.studies.search.display.time.monotonic", lambda: later)
    display.tick()
    assert re.fullmatch(r"quick: 2 of 9 scored, best validation loss \S+, \d+ s left\n", capsys.readouterr().err)
    display.tick()
    assert capsys.readouterr().err == "", "the next one comes in a minute"


def test_a_running_trial_tells_how_far_it_is(
    settings: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any has ended, the time left is taken from those that run."""
    config = settings(trials=1)
    display: list[Display] = []

    class Ticking(QuickScorer):
        def quality(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["progress"](0.5, "training seed 0")
            display[0].tick()
            return super().quality(*args, **kwargs)

    created = run.create_or_resume

    def create(*args: Any) -> Any:
        study = created(*args)
        display.append(Display(study, config, quiet=True))
        monkeypatch.setattr(display[0], "_line_at", -1e9)
        return study

    monkeypatch.setattr(run, "create_or_resume", create)
    search(config, quiet=True, scorer=Ticking)
    line = r"quick: 0 of 1 scored, \d+ s left; trial 0: training seed 0, 50%\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_a_space_that_ends_before_the_trials_is_counted_by_its_points(
    settings: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that another study gave do not count."""
    config = settings(trials=1_000_000)
    study = search(settings(trials=2), quiet=True, scorer=QuickScorer)
    given = [c.point for c in load_candidates(study)][:1]
    study.set_user_attr("start", given)
    display = Display(study, config, quiet=True)
    monkeypatch.setattr(display, "_line_at", -1e9)
    display.tick()
    assert f" of {config.load_space().size() - 1} scored" in capsys.readouterr().err
