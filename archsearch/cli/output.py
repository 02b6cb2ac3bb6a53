"""What the commands print: tables, scores, JSON, a bar on a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from archsearch.score import QUALITY_METRICS, Score, metric_label
from archsearch.spaces.space import HasCosts


def print_json(values: Mapping[str, Any]) -> None:
    """A mapping as JSON; a number that is not finite is an error."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A titled table, its first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a choice may stand in brackets
    Console().print(table)


def cost_cells(cost: HasCosts) -> tuple[str, str, str]:
    """Params in M, MACs in G, activations in MB."""
    return f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.activation_bytes / 1e6:.1f}"


class Tell(Protocol):
    """Told the share done, and of what."""

    def __call__(self, done: float, stage: str = ...) -> None: ...


def show_log() -> None:
    """Print what long preparations log of their progress (`snapgen.progress`), a line each."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("snapgen").setLevel(logging.INFO)


@contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Tell]:
    """A bar for a share done, on a terminal; silence elsewhere."""
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda done, stage=what: progress.update(task, completed=done, description=stage)


def print_score(score: Score) -> None:
    """A score, a row a number."""
    extractor = score.quality.extractor if score.quality else ""
    rows = [("params", f"{score.cost.params / 1e6:.3f} M"), ("MACs", f"{score.cost.macs / 1e9:.3f} G")]
    if latency := score.latency:
        spread = f"{latency.lower_quartile_ms:.3g}–{latency.upper_quartile_ms:.3g}"
        rows.append(("latency", f"{latency.median_ms:.3g} ms [{spread}], {latency.source}, {latency.device}"))
    for name in QUALITY_METRICS:
        estimate = getattr(score.quality, name, None)
        if estimate:
            label = metric_label(name, extractor)
            rows.append((label, f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"))
    print_table("", ("", ""), rows)
