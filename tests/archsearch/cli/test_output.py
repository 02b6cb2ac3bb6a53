"""Progress is a bar with the time left on a terminal, plain lines elsewhere, and nothing where it is not wanted."""

from __future__ import annotations

import sys

import pytest

from archsearch.cli import output
from archsearch.cli.output import progress_bar


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
