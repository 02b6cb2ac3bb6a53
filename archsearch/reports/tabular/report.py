"""Pages of all that a table says, each as Markdown with its numbers as CSV, and a page with all figures."""

from __future__ import annotations

from pathlib import Path

from archsearch.reports.rendering import html, tables
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.tabular import agreement, effects, predictors
from archsearch.studies.tabular.agreement import agreements
from archsearch.studies.tabular.predictors import predictions
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write_texts

TRAIN_STABLY = "score its study again, e.g. with a lower learning_rate"


def write_pages(table: BenchmarkTable, folder: Path) -> list[Path]:
    """Write the pages ``factorial``, ``ranking`` and ``predictors``, and ``figures.html``.

    Returns:
        The files.

    Raises:
        InputError: if too few architectures have scores, or a file cannot be written.
    """
    try:
        found = effects.fits(table)
    except ValueError as error:
        raise InputError(table.source, f"too many runs diverged: {error}", TRAIN_STABLY) from None
    if "validation_loss" not in found:
        raise InputError(table.source, "no run has a validation loss", TRAIN_STABLY)
    compared, predicted = agreements(table), predictions(table)
    sections = {
        "What each choice does": effects.figures(table, found),
        "Which score, from which budget": agreement.figures(compared),
        "How many labels a predictor needs": predictors.figures(predicted),
    }
    files = {
        folder / "factorial.md": effects.markdown(table, found),
        folder / "factorial.csv": tables.csv(effects.frame(found)),
        folder / "ranking.md": agreement.markdown(table, compared),
        folder / "ranking.csv": tables.csv(agreement.frame(compared)),
        folder / "predictors.md": predictors.markdown(predicted),
        folder / "predictors.csv": tables.csv(predictors.frame(predicted)),
        folder / "figures.html": figures_page(
            f"What {table.space.name} says",
            sections,
            headline="Bars: 95 % intervals, of predicted latencies ranges. The pages beside this one have the numbers.",
        ),
    }
    atomic_write_texts(files)
    return list(files)


def figures_page(name: str, sections: dict[str, dict[str, Figure]], *, headline: str) -> str:
    """An HTML page of figures by section and caption."""
    charts: dict[str, Figure] = {}
    shown = []
    for title, figures in sections.items():
        ids = [f"chart-{len(charts) + i}" for i in range(len(figures))]
        charts |= zip(ids, figures.values(), strict=True)
        shown.append((title, [*zip(ids, figures, strict=True)]))
    return html.render_page(
        "tabular.html",
        name=name,
        headline=headline,
        data={"charts": charts},
        sections=[(title, captions) for title, captions in shown if captions],
    )
