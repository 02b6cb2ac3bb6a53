"""How far a long piece of work is: a line in the log now and then."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import diffusers
import transformers


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Without diffusers' and transformers' bars and remarks."""
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


SECONDS_BETWEEN_LINES = 10.0
_log = logging.getLogger(__name__)


class Progress:
    """Counts what is done, and says so every ten seconds, with the time left where the total is known.

    Args:
        source: what the work is done on.
        verb, unit: of the line: ``photos: checked 9 of 30 images, 12 s left``.
        total: how many there are, None if unknown.
    """

    def __init__(self, source: str, verb: str, unit: str, total: int | None) -> None:
        self.source, self.verb, self.unit, self.total = source, verb, unit, total
        self._done = self._found = 0
        self._begun = self._told = time.monotonic()

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told <= SECONDS_BETWEEN_LINES:
            return
        self._told = now
        amount, left = f"{self._done:,}", ""
        if self.total:
            seconds = (now - self._begun) * (self.total - self._done) / (self._done - self._found)
            amount, left = f"{amount} of {self.total:,}", f", {seconds:.0f} s left"
        _log.info("%s: %s %s %s%s", self.source, self.verb, amount, self.unit, left)

    def skip(self, count: int) -> None:
        """So many more were done before: they tell nothing of the time that the others take."""
        self._done += count
        self._found += count
