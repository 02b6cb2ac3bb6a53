"""Progress of long-running work: one callback, log lines, and silencing of other libraries' progress bars."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Protocol, SupportsFloat

SECONDS_BETWEEN_LINES = 10.0

SECONDS_OF_SILENCE = 60.0
"""Longest time without a line of long work where there are no bars, even if its output is quiet."""

_log = logging.getLogger(__name__)


class ProgressCallback(Protocol):
    """Receives the progress of a piece of work: ``progress(0.4, "sampling")``."""

    def __call__(self, fraction: float, message: str = "") -> None:
        """Receive one report.

        Args:
            fraction: fraction of the work that is done, in [0, 1].
            message: description of the current work; empty: unchanged.
        """
        ...


def ignore_progress(fraction: float, message: str = "") -> None:
    """Progress callback that does nothing."""


def subtask(progress: ProgressCallback, start: float, stop: float) -> ProgressCallback:
    """Callback for a part of the work, whose fractions 0 to 1 are mapped to ``start`` to ``stop`` of the whole."""
    return lambda fraction, message="": progress(start + (stop - start) * fraction, message)


def step_message(step: int, steps: int, losses: Mapping[str, SupportsFloat]) -> str:
    """Message for a training step with its losses, for about a hundred steps of a run; empty for the others.

    Most steps have none because reading a loss waits for the device.
    """
    if step % max(1, steps // 100) and step < steps:
        return ""
    return f"step {step:,} of {steps:,}, " + ", ".join(f"{name} {float(loss):.4f}" for name, loss in losses.items())


def time_left(seconds: float, fraction: float) -> str:
    """Estimate of the remaining time as text, from the seconds that ``fraction`` of the work took; empty at 0."""
    if fraction <= 0:
        return ""
    return f"{format_duration(seconds * (1 - fraction) / fraction)} left"


def format_duration(seconds: float) -> str:
    """Format a duration in seconds or minutes, up to 120 of them, or in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class ProgressLog:
    """Counts finished items and logs the count every ten seconds, with the time left if the total is known.

    A line reads ``photos: checked 9 of 30 images, 12 s left``.

    Args:
        source: name of the processed data (``photos``).
        verb: past participle for what is done to an item (``checked``).
        unit: plural of what is counted (``images``).
        total: number of items, None if unknown.
    """

    def __init__(self, source: str, verb: str, unit: str, total: int | None) -> None:
        self.source, self.verb, self.unit, self.total = source, verb, unit, total
        self._done = self._skipped = 0
        self._started = self._logged = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count finished items, and log the count if the last line is more than ten seconds old."""
        self._done += count
        now = time.monotonic()
        if now - self._logged <= SECONDS_BETWEEN_LINES:
            return
        self._logged = now
        amount, left = f"{self._done:,}", ""
        if self.total:
            fraction = (self._done - self._skipped) / max(1, self.total - self._skipped)
            amount, left = f"{amount} of {self.total:,}", f", {time_left(now - self._started, fraction)}"
        _log.info("%s: %s %s %s%s", self.source, self.verb, amount, self.unit, left)

    def skip_to(self, done: int) -> None:
        """Count the items up to ``done`` as finished earlier; they are excluded from the time estimate."""
        self._skipped += done - self._done
        self._done = done

    def items(self, count: int) -> ProgressCallback:
        """Callback for work on the next ``count`` items, which are counted as its fraction grows."""
        added = 0

        def progress(fraction: float, message: str = "") -> None:  # noqa: ARG001 - log lines have their own wording
            nonlocal added
            new = round(fraction * count) - added
            if new > 0:
                added += new
                self.add(new)

        return progress


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Turn off the progress bars and log messages of diffusers and transformers; restore both on exit."""
    import diffusers
    import transformers

    logs = [diffusers.utils.logging, transformers.utils.logging]
    levels = [log.get_verbosity() for log in logs]
    bars = [log for log in logs if log.is_progress_bar_enabled()]
    for log in logs:
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()
