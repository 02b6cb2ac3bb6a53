"""Findings on the user's data, what is left out, cut or unknown: counted by kind, each with an example."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from snapgen.errors import printable

_log = logging.getLogger(__name__)


class Findings:
    """Counts by kind, each with the first example."""

    def __init__(self, findings: Sequence[tuple[str, int, str]] = ()) -> None:
        self._counts = {problem: (count, example) for problem, count, example in findings}

    def add(self, problem: str, example: str) -> None:
        """Count one more of a kind.

        Args:
            problem: the kind, as a predicate of several: ``have no caption``.
            example: the name of this one, used if it is the first of its kind.
        """
        count, first = self._counts.get(problem, (0, example))
        self._counts[problem] = (count + 1, printable(first))

    def listed(self) -> list[tuple[str, int, str]]:
        """Kinds with their counts and examples, in the order of their first occurrence."""
        return [(problem, *found) for problem, found in self._counts.items()]

    @property
    def total(self) -> int:
        """Number of all that were counted."""
        return sum(count for count, _ in self._counts.values())

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {problem}, e.g. {example}" for problem, count, example in self.listed())


@functools.lru_cache(maxsize=1024)
def note(source: str, text: str) -> None:
    """Warn the user of something about a source, once in a process, however often it is read."""
    _log.warning("%s: %s", source, text)
