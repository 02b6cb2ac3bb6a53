"""Pages of all that a table says, each as Markdown with its numbers as CSV."""

from __future__ import annotations

from pathlib import Path

import pandas

from archsearch.reports.rendering import html, tables
from archsearch.reports.tabular import agreement, effects
from archsearch.studies.tabular.agreement import agreements
from archsearch.studies.tabular.predictors import Prediction, predictions
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.io.atomic import atomic_write_texts


def write_pages(table: BenchmarkTable, folder: Path) -> list[Path]:
    """Write the pages ``factorial``, ``ranking`` and ``predictors``, and a page with figures.

    Returns:
        The files.

    Raises:
        InputError: if a file cannot be written.
    """
    compared, predicted = agreements(table), predictions(table)
    files = {
        folder / "factorial.md": effects.markdown(table),
        folder / "factorial.csv": tables.csv(effects.frame(table)),
        folder / "ranking.md": agreement.markdown(compared),
        folder / "ranking.csv": tables.csv(agreement.frame(compared)),
        folder / "predictors.md": predictors_markdown(predicted),
        folder / "predictors.csv": tables.csv(_predictions_frame(predicted)),
    }
    groups = agreement.groups(compared)
    charts = {f"agreement-{i}": agreement.figure(rows) for i, rows in enumerate(groups.values())}
    if charts:
        files[folder / "ranking.html"] = html.render_page(
            "tabular.html",
            name="Which score, from which budget",
            data={"charts": charts},
            headline="Rank agreement of a short run's scores with those of longer runs, or of runs on larger images.",
            charts=[*zip(charts, groups, strict=True)],
        )
    atomic_write_texts(files)
    return list(files)


def predictors_markdown(rows: list[Prediction]) -> str:
    """The page of predictors: rank correlation by the number of labels, for both models and every split."""
    labels = sorted({r.labels for r in rows})
    cells: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        cells.setdefault((r.split, r.model), [r.split, r.model])
    for (split, model), row in cells.items():
        by_labels = {r.labels: r.rho for r in rows if (r.split, r.model) == (split, model)}
        row += [
            f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]" if (rho := by_labels.get(n)) else "–" for n in labels
        ]
    text = (
        "Spearman's ρ of predicted quality with the mean over all runs, of architectures that the predictor was not "
        "fitted to: medians over random sets with their 95 % intervals. It is fitted to one run of each of so many "
        "architectures, or only to those with the base's depth or width, and tested on the others."
    )
    header = ["split", "model", *(f"{n} labels" for n in labels)]
    return (
        f"# How many labels a predictor needs\n\n{text}\n\n{tables.markdown(header, [*cells.values()], text_columns=2)}"
    )


def _predictions_frame(rows: list[Prediction]) -> pandas.DataFrame:
    return pandas.DataFrame(
        [
            {
                "split": r.split,
                "model": r.model,
                "labels": r.labels,
                "rho": r.rho.value,
                "low": r.rho.low,
                "high": r.rho.high,
            }
            for r in rows
        ]
    )
