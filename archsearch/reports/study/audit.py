"""Table of a proxy audit: the rank agreement of every score and baseline with every target; HTML, Markdown and CSV."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archsearch.score import OBJECTIVES
from archsearch.stats import rank_correlation
from archsearch.studies.experiments.proxy_audit import FROM_SCRATCH, TWIN, AgreementRow

HEADER = tuple(field.name for field in dataclasses.fields(AgreementRow))


FEW = 10
"""Number of candidates below which the table says that it can hardly tell anything."""


def load_audit(attrs: Mapping[str, Any]) -> list[AgreementRow]:
    """Rows that the last audit stored in a study's attributes; empty if the study was not audited."""
    return [AgreementRow(**row) for row in attrs.get("audit", [])]


def markdown(rows: Sequence[AgreementRow]) -> str:
    """Format the audit as a Markdown table with one row per agreement, and what few candidates cannot tell."""
    from archsearch.reports.rendering import tables

    header = ("score", "against", "kind", "ρ", "95 % interval", "n")
    table = tables.markdown(header, [_cells(r) for r in rows], text_columns=3)
    return f"{table}\n{text}\n" if (text := warning(rows)) else table


def warning(rows: Sequence[AgreementRow]) -> str:
    """Sentence on how little few candidates can tell; empty for more."""
    count = min((row.n for row in rows), default=FEW)
    if count >= FEW:
        return ""
    widest = _span(*rank_correlation.interval(1, count))
    return (
        f"Only {count} candidates: even a ρ of {_correlation(1)} of so few has the interval {widest}, and where an "
        f"interval holds 0 the agreement may be chance. Audit {FEW} or more."
    )


def csv(rows: Sequence[AgreementRow]) -> str:
    """Format the audit as CSV with the columns of `HEADER`; missing numbers are empty."""
    import pandas

    from archsearch.reports.rendering import tables

    return tables.csv(pandas.DataFrame([[getattr(r, name) for name in HEADER] for r in rows], columns=list(HEADER)))


def section(rows: Sequence[AgreementRow]) -> str:
    """Render the audit's section of the report as HTML."""
    from archsearch.reports.rendering import html

    return html.render_template(
        "audit.html",
        rows=[_cells(r) for r in rows],
        elastic=any(FROM_SCRATCH in r.score for r in rows),
        proxy=any(TWIN in r.score for r in rows),
        warning=warning(rows),
    )


def write_audit(rows: Sequence[AgreementRow], out: Path) -> Path:
    """Write the table as Markdown and as CSV, next to each other under the stem of ``out``.

    Returns:
        ``out``.

    Raises:
        InputError: if a file cannot be written.
    """
    from snapgen.io.atomic import atomic_write_texts

    other = out.with_suffix(".md" if out.suffix == ".csv" else ".csv")
    atomic_write_texts({path: csv(rows) if path.suffix == ".csv" else markdown(rows) for path in (out, other)})
    return out


def _cells(row: AgreementRow) -> tuple[str, ...]:
    return (_display_name(row.score), _display_name(row.target), row.kind, *_rho_and_interval(row), str(row.n))


def _display_name(name: str) -> str:
    """Replace the field names of objectives by their display names."""
    for field, objective in OBJECTIVES.items():
        name = name.replace(field, objective.label)
    return name


def _rho_and_interval(row: AgreementRow) -> tuple[str, str]:
    if row.rho is None:
        return "–", "–"
    return _correlation(row.rho), "–" if row.low is None or row.high is None else _span(row.low, row.high)


def _span(low: float, high: float) -> str:
    return f"{_correlation(low)} to {_correlation(high)}"


def _correlation(rho: float) -> str:
    return f"{rho:.2f}".replace("-", "−")
