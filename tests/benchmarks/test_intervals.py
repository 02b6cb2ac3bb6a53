"""The intervals cover as often as they claim, and the verdicts are false no more often: the cases of the benchmark."""

from __future__ import annotations

import pytest

from benchmarks.interval_cases import DRAWS, Case, coverage, false_verdicts
from tests.docs.pages import ROOT

FEWER = DRAWS // 4
NOISE = 0.025
"""Of a rate over so few draws: at least twice its standard deviation."""


def name(case: Case) -> str:
    return f"{case.name}: {case.condition}"


def test_the_published_page_has_every_case() -> None:
    page = (ROOT / "reports" / "results" / "statistics.md").read_text().partition("## What was wrong")[0]
    shown = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ")]
    cases = [case.condition for case in (*coverage(), *false_verdicts())]
    assert [text for text in shown if text not in ("data", "---")] == cases


@pytest.mark.slow
@pytest.mark.parametrize("case", list(coverage()), ids=name)
def test_an_interval_covers_as_often_as_it_claims(case: Case) -> None:
    assert case.rate(FEWER) > case.nominal - case.excess - NOISE / case.share**0.5


@pytest.mark.slow
@pytest.mark.parametrize("case", list(false_verdicts()), ids=name)
def test_a_verdict_is_false_no_more_often_than_it_claims(case: Case) -> None:
    assert case.rate(FEWER) < case.nominal + case.excess + NOISE / case.share**0.5
