"""Tables in Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from archsearch.score import LatencyRecord
from archsearch.stats.estimate import Estimate

if TYPE_CHECKING:
    import pandas


class Table(NamedTuple):
    """A table of texts, for a page and for Markdown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """Number of leading columns that hold text."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table with the first ``text_columns`` columns left-aligned and the others right-aligned."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(header))]
    lines = [[_cell(text) for text in row] for row in (header, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def csv(frame: pandas.DataFrame, float_format: str | None = None) -> str:
    """Format a data frame as CSV; missing numbers are empty, and a text that a spreadsheet would run is quoted."""
    frame = frame.rename(columns=_inert).map(_inert)
    return frame.to_csv(index=False, lineterminator="\n", float_format=float_format)


def _inert(cell: Any) -> Any:
    """A cell with an apostrophe before what would be a formula, on one line."""
    if not isinstance(cell, str):
        return cell
    line = cell.replace("\r", " ").replace("\n", " ")
    return f"'{line}" if line.lstrip().startswith(("=", "+", "-", "@")) else line


def latency_columns(record: LatencyRecord) -> dict[str, Any]:
    """Flatten a latency record into columns; the median is called as in a study's settings."""
    fields = record.model_dump(exclude={"placement"})
    return {"latency_ms": fields.pop("median_ms")} | {f"latency_{key}": value for key, value in fields.items()}


def quality_columns(name: str, estimate: Estimate) -> dict[str, Any]:
    """Flatten a quality number into columns: its value, interval and value per seed."""
    row = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row | {f"{name}_seed_{i}": value for i, value in enumerate(estimate.by_seed)}
