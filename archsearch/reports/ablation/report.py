"""Write the table of an ablation as HTML, Markdown, LaTeX and CSV; convert it to JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.reports.ablation import reproduction
from archsearch.reports.ablation.table import latex, markdown
from archsearch.reports.rendering import tables
from archsearch.studies.experiments.ablation_results import COSTS, Ablation, Effect, RowResult
from snapgen.errors import InputError

if TYPE_CHECKING:
    import pandas


SUFFIXES = (".html", ".md", ".tex", ".csv")


def write_ablation(ablation: Ablation, out: Path) -> Path:
    """Write the table in all four formats, next to each other under the stem of ``out``.

    Returns:
        ``out``.

    Raises:
        InputError: if ``out`` has another suffix, or a file cannot be written.
    """
    from archsearch.reports.ablation import page
    from snapgen.io.atomic import atomic_write_texts

    check_suffix(out)
    forms = {
        ".html": page.render(ablation),
        ".md": markdown(ablation),
        ".tex": latex(ablation),
        ".csv": tables.csv(frame(ablation)),
    }
    atomic_write_texts({out.with_suffix(suffix): text for suffix, text in forms.items()})
    return out


def check_suffix(out: Path | None) -> None:
    """Raise an InputError if a file's suffix is not a format of the table; call it before anything is measured."""
    if out is not None and out.suffix not in SUFFIXES:
        raise InputError(out, "is not a format of the table", f"use one of the suffixes {', '.join(SUFFIXES)}")


def frame(ablation: Ablation) -> pandas.DataFrame:
    """Data frame with one row per row of the ablation and all its numbers in base units, with their sources."""
    import pandas

    return pandas.DataFrame([frame_row(ablation, r) for r in ablation.results])


def to_dict(ablation: Ablation) -> dict[str, Any]:
    """Convert the ablation to plain data for JSON."""
    rows = frame(ablation).astype(object)
    return {
        "name": ablation.name,
        "reproduction": reproduction.sentences(ablation),
        "sources": dict(reproduction.sources(ablation)),
        "rows": rows.where(rows.notna(), None).to_dict("records"),
        "sums": [{**vars(s), "excess": s.excess.model_dump(mode="json") if s.excess else None} for s in ablation.sums],
    }


def frame_row(ablation: Ablation, r: RowResult) -> dict[str, Any]:
    """One row's numbers by column of the CSV."""
    row: dict[str, Any] = {"row": r.planned.name, "title": r.planned.title, "group": r.planned.group}
    row |= {
        "baseline": r.planned.baseline,
        "architecture_id": r.planned.architecture.id,
        "trial": r.trial,
        "error": r.error,
    }
    row |= r.score.cost.model_dump() if r.score else {}
    row |= tables.latency_columns(r.score.latency) if r.score and r.score.latency else {}
    for name in COSTS:
        row[f"{name}_change_percent"] = r.changes.get(name)
        published = r.planned.published.get(name)
        row[f"{name}_published_percent"] = published.value if published else None
        row[f"{name}_points_apart"] = r.apart(name)
    row["latency_ms_fitted_to"] = r.is_latency_fitted
    fid = r.planned.published.get("frechet_distance")
    row["published_fid"] = fid.value if fid else None
    for metric in ablation.metrics:
        estimate, effect = r.quality.get(metric), r.effects.get(metric)
        row |= tables.quality_columns(metric, estimate) if estimate else {}
        row |= _effect_columns(metric, effect) if effect else {}
    if r.score and r.score.quality:
        row |= r.score.quality.model_dump(include={"extractor", "protocol_hash"})
    return row


def _effect_columns(metric: str, effect: Effect) -> dict[str, Any]:
    d = effect.difference
    columns = {"difference": d.value, "difference_low": d.low, "difference_high": d.high, "verdict": effect.verdict}
    return {f"{metric}_{key}": value for key, value in columns.items()}
