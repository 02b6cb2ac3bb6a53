"""The one exception that a user's mistake raises, anywhere in archsearch."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave; the command line prints it as one line and exits with 2.

    Args:
        source: the file, folder, URL or option that holds the mistake.
        problem: what is wrong with it.
        remedy: what to do about it, as an imperative.
        place: where in the source, e.g. ``knobs.stages[0].channels[1]`` or ``line 3``.
    """

    def __init__(self, source: str | Path, problem: str, remedy: str, *, place: str = "") -> None:
        self.source, self.place, self.problem, self.remedy = str(source), place, problem, remedy
        where = f"{self.source}: {place}" if place else self.source
        super().__init__(" ".join(f"{where}: {problem}; {remedy}".split()))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return (_rebuild, (self.source, self.problem, self.remedy, self.place))


def _rebuild(source: str, problem: str, remedy: str, place: str) -> InputError:
    return InputError(source, problem, remedy, place=place)


def first_line(error: Exception) -> str:
    """What an error says, in one line that is not long; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
