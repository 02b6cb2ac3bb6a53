"""How long a search, an ablation or an audit takes, told before it begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch import cli
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.experiments.proxy_audit import audit_time
from archsearch.studies.experiments.search_time import STEPS, search_time
from archsearch.studies.search.run import search
from tests.archsearch import tiny_studies
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


class Slow(QuickScorer):
    """Every training step of every seed takes a second."""

    def __init__(self, settings: StudyConfig, space: Any) -> None:
        super().__init__(settings, space)
        self._steps = settings.protocol.steps

    def quality(self, *args: Any, **kwargs: Any) -> Any:
        seconds = float(self._steps * len(kwargs["seeds"]))
        return super().quality(*args, **kwargs).model_copy(update={"training_seconds": seconds})


def test_what_has_not_begun_is_timed_by_a_few_steps(settings: Make) -> None:
    config = settings(trials=10, workers=2, protocol={"steps": 100, "train_seeds": [0, 1]})
    found = search_time(config, scorer=Slow)
    assert found.seconds_each == pytest.approx(200, abs=5), "two seeds of 100 steps"
    assert found.seconds == pytest.approx(1000, abs=25)
    assert "10 candidates are left" in found.text
    assert f"the time of {STEPS} training steps" in found.text
    assert not config.folder.exists(), "nothing begins"
    short = search_time(settings(trials=10, time_budget_minutes=5, protocol={"steps": 100}), scorer=Slow)
    assert short.seconds == 300
    assert short.text.endswith("about 5 min, of 5 min at most")


def test_what_has_begun_is_timed_by_its_trials(settings: Make) -> None:
    search(settings(trials=4), quiet=True, scorer=QuickScorer)
    found = search_time(settings(trials=9), scorer=Slow)
    assert found.candidates == 5
    assert found.source == "the median of 4 scored"
    assert found.seconds_each < 5


def test_an_audit_is_timed_by_the_short_runs(settings: Make) -> None:
    config = settings(trials=6, protocol={"steps": 10})
    search(config, quiet=True, scorer=Slow)
    assert "6 runs of 50 steps are left, about 5 min" in audit_time(config, factor=5)
    assert "4 runs of 50 steps are left, about 3 min" in audit_time(config, factor=5, candidates=4)


@pytest.mark.parametrize(
    ("command", "told"),
    [("search", "emoji: 3 candidates are left"), ("ablate", "ablation-emoji: 4 candidates are left")],
)
def test_the_commands_say_it_and_do_nothing(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_studies.ship(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["archsearch", command, "emoji", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr().out
    assert (ended.value.code, out.partition(",")[0]) == (0, told)
    assert not (tmp_path / "runs").exists()
