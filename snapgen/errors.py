"""The exception that reports a user's mistake, everywhere in snapgen and archsearch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Invalid input from the user; the command line prints it in one line and exits with status 2.

    Args:
        source: file, folder, URL or option with the mistake.
        problem: the mistake, as a predicate of the source.
        remedy: how to correct it, as an imperative.
        place: location within the source, e.g. ``knobs.levels[0].channels[1]`` or ``line 3``.
        others: further mistakes found at the same time, which the command line prints, too.
    """

    def __init__(
        self, source: str | Path, problem: str, remedy: str, *, place: str = "", others: Sequence[InputError] = ()
    ) -> None:
        self.source, self.place, self.problem, self.remedy = str(source), place, problem, remedy
        self.others = tuple(others)
        location = f"{self.source}: {place}" if place else self.source
        # A file's name may hold bytes that are not UTF-8, which cannot be printed.
        message = f"{location}: {problem}; {remedy}".encode(errors="surrogateescape").decode(errors="replace")
        super().__init__(printable(" ".join(message.split())))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return (_rebuild, (self.source, self.problem, self.remedy, self.place, self.others))


_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_WHITESPACE = ("\n", "\t")


def printable(text: str, *, newlines: bool = False) -> str:
    """A text without characters that control a terminal or reorder a line; a name from a file may hold any.

    Args:
        newlines: whether line feeds and tabs may stay.
    """
    return _CONTROLS.sub(lambda found: found[0] if newlines and found[0] in _WHITESPACE else "\ufffd", text)


def _rebuild(source: str, problem: str, remedy: str, place: str, others: Sequence[InputError]) -> InputError:
    return InputError(source, problem, remedy, place=place, others=others)


def all_of(parts: Iterable[Callable[[], T]]) -> list[T]:
    """Results of several functions.

    Raises:
        InputError: the first that any of them raises, with the further ones as its ``others``.
    """
    results, mistakes = [], []
    for part in parts:
        try:
            results.append(part())
        except InputError as error:
            mistakes += [error, *error.others]
    if mistakes:
        first = mistakes[0]
        raise InputError(first.source, first.problem, first.remedy, place=first.place, others=mistakes[1:]) from None
    return results


@contextmanager
def os_errors(source: str | Path, remedy: str, problem: str = "cannot be written") -> Iterator[None]:
    """Report an error of the operating system as one of the user's; ``problem``: if the system does not name it."""
    try:
        yield
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else (error.strerror or problem).lower()
        raise InputError(source, reason, remedy) from None


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 160 characters; the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:160]) if lines else type(error).__name__
