"""The audit of the scores: which of them, and which mere baseline, agrees with what; as HTML, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HEADER = ("score", "target", "kind", "rho", "low", "high", "n")


class Row(Protocol):
    """One agreement, measured by Spearman's rank correlation.

    ``score`` is what was ranked by, ``target`` what by in turn (the same score with another seed, or after a long
    run), ``kind`` how compute was held (``as is``, ``equal compute``), ``low`` and ``high`` the 95 % interval, ``n``
    the candidates behind it. ``rho`` is None where it could not be taken.
    """

    @property
    def score(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def rho(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def n(self) -> int: ...


@dataclass(frozen=True)
class Told:
    """A row as a study keeps it in its attributes."""

    score: str
    target: str
    kind: str
    rho: float | None
    low: float | None
    high: float | None
    n: int


def told(rows: Sequence[dict[str, object]]) -> list[Told]:
    """Rows from JSON; keys that are not of a row are left out."""
    return [Told(**{key: row[key] for key in HEADER}) for row in rows]  # type: ignore[arg-type]


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, a row for each agreement."""
    from reports import tables

    header = ("score", "against", "kind", "ρ", "95 % interval", "n")
    return tables.markdown(header, [(r.score, r.target, r.kind, *_figures(r), str(r.n)) for r in rows])


def csv(rows: Sequence[Row]) -> str:
    """As CSV with the columns of `HEADER`; what could not be taken is empty."""
    import pandas

    from reports import tables

    return tables.csv(pandas.DataFrame([[getattr(r, name) for name in HEADER] for r in rows], columns=list(HEADER)))


def section(rows: Sequence[Row]) -> str:
    """The report's section, as HTML."""
    from reports import page

    return page.fragment("audit.html", rows=[(r.score, r.target, r.kind, *_figures(r), r.n) for r in rows])


def write(rows: Sequence[Row], out: Path) -> Path:
    """Write the table as Markdown, or as CSV if ``out`` ends in ``.csv``; and the other beside it.

    Returns:
        ``out``.

    Raises:
        InputError: if a file cannot be written.
    """
    from reports.pareto import put

    beside = out.with_suffix(".md" if out.suffix == ".csv" else ".csv")
    for path in (out, beside):
        put(path, csv(rows) if path.suffix == ".csv" else markdown(rows))
    return out


def _figures(row: Row) -> tuple[str, str]:
    if row.rho is None:
        return "–", "–"
    interval = "–" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}"
    return f"{row.rho:.2f}".replace("-", "−"), interval.replace("-", "−")
