"""Output of the commands: tables, scores, JSON, a bar on a terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from snapgen.errors import InputError, printable
from snapgen.io.atomic import check_writable
from snapgen.progress import SECONDS_BETWEEN_LINES, SECONDS_OF_SILENCE, ProgressCallback, time_left

if TYPE_CHECKING:
    from archsearch.score import Score
    from archsearch.spaces.space import HasCosts


def check_out(out: Path | None, *suffixes: str) -> None:
    """Check, before long work, that a file can be written, and that its name ends in one of the suffixes.

    Raises:
        InputError: if not.
    """
    if out is None:
        return
    if out.suffix.lower() not in suffixes:
        raise InputError("--out", f"{out} has another ending", f"end it in {', '.join(suffixes)}")
    if out.is_dir():
        raise InputError("--out", f"{out} is a folder", "name a file")
    check_writable(out)


def print_json(values: Mapping[str, Any]) -> None:
    """A mapping as JSON; a number that is not finite is an error."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, numbers: bool = True) -> None:
    """A titled table; its first column is to the left, the others to the right if they hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # not markup: a choice may stand in brackets
    Console().print(table)


def cost_cells(cost: HasCosts) -> tuple[str, str, str]:
    """Params in M, MACs in G, activations in MB."""
    return f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.activation_bytes / 1e6:.1f}"


def show_log(*, quiet: bool = False) -> None:
    """Print what long preparations log of their progress (`snapgen.progress`); if quiet a line a minute."""
    handler = logging.StreamHandler()
    if quiet:
        handler.addFilter(_ALineAMinute())
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("snapgen").setLevel(logging.INFO)


class _ALineAMinute(logging.Filter):
    """Lets through warnings, and a line of progress if there was none for a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._written = time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        is_progress, now = record.levelno < logging.WARNING, time.monotonic()
        if is_progress and now - self._written < SECONDS_OF_SILENCE:
            return False
        self._written = now if is_progress else self._written
        return True


@contextmanager
def progress_bar(description: str, *, quiet: bool) -> Iterator[ProgressCallback]:
    """A progress callback that draws a bar with the time left on a terminal, and writes plain lines elsewhere.

    Args:
        description: shown until the first message comes.
        quiet: write a line a minute only.
    """
    if quiet or not sys.stderr.isatty():
        yield _PlainLines(description, seconds=SECONDS_OF_SILENCE if quiet else SECONDS_BETWEEN_LINES)
    else:
        console = Console(stderr=True)
        with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
            task = bar.add_task(description, total=1.0)
            yield lambda fraction, message="": bar.update(task, completed=fraction, description=message or None)


class _PlainLines:
    """A progress callback that writes a line now and then, for a log file."""

    def __init__(self, description: str, *, seconds: float) -> None:
        self._message, self._seconds = description, seconds
        self._begun = self._written = time.monotonic()
        self._first: float | None = None

    def __call__(self, fraction: float, message: str = "") -> None:
        now, self._message = time.monotonic(), message or self._message
        if self._first is None:  # what an earlier run of the same command did takes no time now
            self._first = fraction
        if now - self._written < self._seconds:
            return
        self._written = now
        left = time_left(now - self._begun, (fraction - self._first) / max(1e-9, 1 - self._first))
        typer.echo(f"{self._message}: {fraction:.0%}" + (f", {left}" if left else ""), err=True)


def print_score(score: Score, *, interval: str = "95 % interval") -> None:
    """A score, a row a number, as reports show it, and what [a, b] is.

    Args:
        score: what to print.
        interval: what the interval of a quality is.
    """
    from archsearch.reports.rendering.formatting import format_value
    from archsearch.score import QUALITY_METRICS, metric_label

    rows = [("params", f"{score.cost.params / 1e6:.3f} M"), ("MACs", f"{score.cost.macs / 1e9:.3f} G")]
    intervals = []
    if latency := score.latency:
        shown = format_value(latency.estimate, "latency_ms", ends=True)
        rows.append((metric_label("latency_ms", "", records=[latency]), shown))
        intervals.append(f"{latency.interval_name} of the latency, {latency.source}, {latency.device}")
    for name in QUALITY_METRICS:
        if score.quality and (estimate := getattr(score.quality, name)):
            label = metric_label(name, score.quality.extractor, score.quality.proxy)
            rows.append((label, format_value(estimate, name, ends=True)))
    if score.quality:
        intervals.append(f"{interval} of quality")
    print_table("", ("", ""), rows)
    if intervals:
        typer.echo(f"[a, b]: {'; '.join(intervals)}")
