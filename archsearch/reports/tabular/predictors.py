"""Page of predictors: how many scored architectures they need, in and out of distribution."""

from __future__ import annotations

from collections.abc import Sequence

import pandas

from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure, lines
from archsearch.reports.tabular.labels import label
from archsearch.studies.tabular.predictors import DRAWS, METRIC, Prediction


def frame(rows: Sequence[Prediction]) -> pandas.DataFrame:
    """Every correlation: a row each."""
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


def markdown(rows: Sequence[Prediction]) -> str:
    """The page: rank correlation by the number of labels, for both models and every split."""
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
        f"Spearman's ρ of the predicted {label(METRIC)} with its mean over the table's seeds, of architectures to "
        f"which the predictor was not fitted: medians over {DRAWS} random sets with their 95 % intervals. It is fitted "
        "to one run of each of so many architectures, or only to those with the base's depth or width, and tested on "
        "the others."
    )
    header = ["split", "model", *(f"{n} labels" for n in labels)]
    return (
        f"# How many labels a predictor needs\n\n{text}\n\n{tables.markdown(header, [*cells.values()], text_columns=2)}"
    )


def figures(rows: Sequence[Prediction]) -> dict[str, Figure]:
    """Median correlation by the number of labels: a line per model and split."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        found.setdefault(f"{r.model}, {r.split}", []).append((r.labels, r.rho.value))
    return {"Medians over random sets": lines(found, "Architectures with one run", "Spearman's ρ")} if rows else {}
