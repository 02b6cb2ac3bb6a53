"""The audit of the scores: which of them, and which mere baseline, agrees with what; as HTML, Markdown and CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archsearch.score import OBJECTIVES
from archsearch.studies.experiments.proxy_audit import FROM_SCRATCH, Row

HEADER = tuple(field.name for field in dataclasses.fields(Row))


def kept(attrs: Mapping[str, Any]) -> list[Row]:
    """The rows that the last audit left in a study's attributes; none: there was no audit."""
    return [Row(**row) for row in attrs.get("audit", [])]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, a row for each agreement."""
    from archsearch.reports.rendering import tables

    header = ("score", "against", "kind", "ρ", "95 % interval", "n")
    return tables.markdown(header, [_told(r) for r in rows], words=3)


def csv(rows: Sequence[Row]) -> str:
    """As CSV with the columns of `HEADER`; what could not be taken is empty."""
    import pandas

    from archsearch.reports.rendering import tables

    return tables.csv(pandas.DataFrame([[getattr(r, name) for name in HEADER] for r in rows], columns=list(HEADER)))


def section(rows: Sequence[Row]) -> str:
    """The report's section, as HTML."""
    from archsearch.reports.rendering import html

    return html.render_template(
        "audit.html", rows=[_told(r) for r in rows], elastic=any(FROM_SCRATCH in r.score for r in rows)
    )


def write_audit(rows: Sequence[Row], out: Path) -> Path:
    """Write the table as Markdown, or as CSV if ``out`` ends in ``.csv``; and the other beside it.

    Returns:
        ``out``.

    Raises:
        InputError: if a file cannot be written.
    """
    from snapgen.io.atomic import atomic_write_text

    beside = out.with_suffix(".md" if out.suffix == ".csv" else ".csv")
    for path in (out, beside):
        atomic_write_text(path, csv(rows) if path.suffix == ".csv" else markdown(rows))
    return out


def _told(row: Row) -> tuple[str, ...]:
    return (_worded(row.score), _worded(row.target), row.kind, *_figures(row), str(row.n))


def _worded(name: str) -> str:
    """With a number's name for people in the place of its field's."""
    for field, objective in OBJECTIVES.items():
        name = name.replace(field, objective.label)
    return name


def _figures(row: Row) -> tuple[str, str]:
    if row.rho is None:
        return "–", "–"
    interval = "–" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"
    return f"{row.rho:.2f}".replace("-", "−"), interval.replace("-", "−")
