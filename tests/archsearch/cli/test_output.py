"""Progress is a bar with the time left on a terminal, plain lines elsewhere, and nothing where it is not wanted."""

from __future__ import annotations

import sys

import pytest

from archsearch.cli import output
from archsearch.cli.output import print_score, progress_bar
from archsearch.reports.rendering import formatting
from archsearch.score import Cost, Quality, Score
from archsearch.stats.estimate import Estimate
from tests.records import latency_record


def test_without_a_terminal_it_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("measuring", quiet=False) as progress:
        progress(0.5)
        progress(0.75, "fitting")
        progress(1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["measuring: 50%", "fitting: 75%, 0 s left", "fitting: 100%, 0 s left"]


def test_lines_are_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measuring", quiet=False) as progress:
        for i in range(100):
            progress(i / 100)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("measuring", quiet=False) as progress:
        progress(0.5, "fitting")
    err = capsys.readouterr().err
    assert "fitting" in err
    assert "50%" in err


def test_quiet_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("measuring", quiet=True) as progress:
        progress(0.5, "fitting")
    assert capsys.readouterr().err == ""


def test_a_score_is_printed_as_a_report_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    loss = Estimate(value=1.25375, low=1.23919, high=1.26831)
    quality = Quality(validation_loss=loss, extractor="none", protocol_hash="p", training_seconds=1)
    predicted = {"lower_quartile_ms": 162, "upper_quartile_ms": 187, "interval_ms": (118, 256), "source": "predicted"}
    record = latency_record(174, device="iphone-15-pro", **predicted)
    score = Score(cost=Cost(params=10**6, macs=10**9, activation_bytes=1), latency=record, quality=quality)
    print_score(score, interval="pooled 95 % interval")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").splitlines()]
    assert "predicted latency 174 ms [118, 256]" in lines
    assert f"validation loss {formatting.format_interval(loss)}" in lines
    assert "[a, b]: 90 % interval of the latency, predicted, iphone-15-pro; pooled 95 % interval of quality" in lines
    assert not any("162" in line for line in lines), "quartiles are not the interval of a prediction"
    print_score(Score(cost=score.cost, latency=latency_record(2.0, upper_quartile_ms=2.2)))
    assert "[a, b]: quartiles of the latency, measured, host" in capsys.readouterr().out
