"""Tables of a proxy audit: which scores are fit to rank by, and how every score and baseline agrees with every target.

They are written as HTML, Markdown and CSV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from archsearch.score import OBJECTIVES
from archsearch.stats import rank_correlation
from archsearch.stats.rank_correlation import FIT
from archsearch.studies.experiments.proxy_audit import (
    AS_IS,
    BASELINES,
    CONTROLLED_FOR,
    FROM_SCRATCH,
    ITSELF,
    TWIN,
    AgreementRow,
)

HEADER = tuple(field.name for field in dataclasses.fields(AgreementRow))

RULE = (
    f"A score is fit to rank if the whole 95 % interval of its agreement with the long run, as it is and at equal "
    f"latency, lies above {FIT}."
)

FEW = 10
"""Number of candidates below which the table says that it can hardly tell anything."""


def load_audit(attrs: Mapping[str, Any]) -> list[AgreementRow]:
    """Rows that the last audit stored in a study's attributes; empty if the study was not audited."""
    return [AgreementRow(**row) for row in attrs.get("audit", [])]


class Fitness(NamedTuple):
    """Whether a score is fit to rank by, and what would settle it, as it is displayed."""

    score: str
    target: str
    fit: str
    settles: str


def fitness(rows: Sequence[AgreementRow], *, steps: int) -> list[Fitness]:
    """Say of each score of the short runs whether it is fit to rank as each score of the long runs does.

    It is if its agreement is above `FIT` both as it is and at equal latency, at the lower ends of the intervals.

    Args:
        steps: training steps of the short runs.
    """
    kinds = (AS_IS, CONTROLLED_FOR["latency_ms"])
    pairs: dict[tuple[str, str], list[AgreementRow]] = {}
    for row in rows:
        is_score = not row.score.startswith(BASELINES) and FROM_SCRATCH not in row.score
        if is_score and row.target != ITSELF and row.kind.startswith(kinds) and row.low is not None:
            pairs.setdefault((row.score, row.target), []).append(row)
    return [
        Fitness(_display_name(score), _display_name(target), *_fitness(of_one, steps))
        for (score, target), of_one in pairs.items()
    ]


def _fitness(rows: Sequence[AgreementRow], steps: int) -> tuple[str, str]:
    needed: list[int | None] = []
    for row in rows:
        assert row.rho is not None
        assert row.low is not None
        if row.low <= FIT:
            needed.append(rank_correlation.candidates_needed(row.rho, controls=int(row.kind != AS_IS)))
    if not needed:
        return "yes", "–"
    if None in needed:
        return "no", f"longer short runs, e.g. of {2 * steps:,} steps instead of {steps:,}: ρ itself is not above {FIT}"
    most = max(n for n in needed if n is not None)
    return "not shown", f"{most:,} candidates, if ρ stays as it is (now {rows[0].n})"


def markdown(rows: Sequence[AgreementRow], *, steps: int) -> str:
    """Format the audit as Markdown tables: which scores are fit to rank, and one row per agreement.

    Args:
        steps: training steps of the short runs.
    """
    from archsearch.reports.rendering import tables

    header = ("score", "against", "kind", "ρ", "95 % interval", "n")
    parts = [tables.markdown(header, [_cells(r) for r in rows], text_columns=3)]
    if text := warning(rows):
        parts.append(f"{text}\n")
    if found := fitness(rows, steps=steps):
        table = tables.markdown(("score", "against", "fit to rank", "what would settle it"), found, text_columns=4)
        parts = [f"{RULE}\n\n{table}", *parts]
    return "\n".join(parts)


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


def section(rows: Sequence[AgreementRow], *, steps: int) -> str:
    """Render the audit's section of the report as HTML."""
    from archsearch.reports.rendering import html

    return html.render_template(
        "audit.html",
        rows=[_cells(r) for r in rows],
        elastic=any(FROM_SCRATCH in r.score for r in rows),
        proxy=any(TWIN in r.score for r in rows),
        warning=warning(rows),
        fitness=fitness(rows, steps=steps),
        rule=RULE,
    )


def write_audit(rows: Sequence[AgreementRow], out: Path, *, steps: int) -> Path:
    """Write the table as Markdown and as CSV, next to each other under the stem of ``out``.

    Returns:
        ``out``.

    Raises:
        InputError: if a file cannot be written.
    """
    from snapgen.io.atomic import atomic_write_texts

    other = out.with_suffix(".md" if out.suffix == ".csv" else ".csv")
    atomic_write_texts(
        {path: csv(rows) if path.suffix == ".csv" else markdown(rows, steps=steps) for path in (out, other)}
    )
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
