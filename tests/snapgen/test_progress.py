"""Progress is reported in one way, and the time left is estimated from what was done just now."""

from __future__ import annotations

import logging

import pytest

from snapgen import progress
from snapgen.progress import ProgressLog, step_message, subtask, time_left


def test_a_subtask_is_a_part_of_the_whole() -> None:
    reports: list[tuple[float, str]] = []
    part = subtask(lambda fraction, message="": reports.append((fraction, message)), 0.5, 0.75)
    part(0)
    part(0.5, "sampling")
    part(1.0)
    assert reports == [(0.5, ""), (0.625, "sampling"), (0.75, "")]


@pytest.mark.parametrize(
    ("seconds", "fraction", "words"),
    [
        (9.0, 0, ""),
        (10.0, 0.5, "10 s left"),
        (20.0, 0.2, "80 s left"),
        (100.0, 0.25, "5 min left"),
        (7200.0, 0.5, "2.0 h left"),
    ],
)
def test_the_time_left_is_in_a_fitting_unit(seconds: float, fraction: float, words: str) -> None:
    assert time_left(seconds, fraction) == words


def test_a_step_has_a_message_a_hundred_times() -> None:
    messages = [step_message(step, 1000, {"mse": 0.5}) for step in range(1, 1001)]
    assert sum(map(bool, messages)) == 100
    assert messages[-1] == "step 1,000 of 1,000, mse 0.5000"
    assert step_message(3, 7, {"l1": 1.0, "mse": 0.25}) == "step 3 of 7, l1 1.0000, mse 0.2500"


def test_fractions_are_counted_as_items(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        log = ProgressLog("photos", "encoded", "captions", 12)
        log.skip_to(4)
        report = log.items(8)
        report(0.5, "encoding")
        report(0.51)
        report(1.0)
    assert [record.message for record in caplog.records] == [
        "photos: encoded 8 of 12 captions, 0 s left",
        "photos: encoded 12 of 12 captions, 0 s left",
    ]
