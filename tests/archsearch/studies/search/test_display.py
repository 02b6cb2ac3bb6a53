"""The lines of a search that is running."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from archsearch.studies.config.study import StudyConfig
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
