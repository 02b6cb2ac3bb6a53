"""Page of rank agreement: which score of a short run, from which budget, ranks as long runs do."""

from __future__ import annotations

import pandas

from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure, base_layout, scatter
from archsearch.studies.tabular.agreement import AS_IS, Agreement, best_budget

COLORS = ("var(--accent)", "var(--dominated)", "var(--ink)", "var(--muted)")


def frame(rows: list[Agreement]) -> pandas.DataFrame:
    """Every agreement: a row each."""
    return pandas.DataFrame(
        [
            {
                "score": r.score,
                "budget": r.budget,
                "target": r.target,
                "kind": r.kind,
                "n": r.n,
                "rho": r.rho and r.rho.value,
                "low": r.rho and r.rho.low,
                "high": r.rho and r.rho.high,
                "ceiling": r.ceiling,
            }
            for r in rows
        ]
    )


def markdown(rows: list[Agreement]) -> str:
    """The page; it says so if there are no long runs."""
    title = "# Which score, from which budget"
    if not rows:
        return f"{title}\n\nThe table has no longer runs to compare with.\n"
    targets = list(dict.fromkeys(r.target for r in rows))
    parts = [
        title,
        f"Spearman's ρ of scores of the short run with those of longer ones; {rows[0].n} architectures. Budget: "
        "share of the short run's steps. Ceiling: what the noise of the score's seeds leaves of ρ = 1. The "
        "intervals are in the CSV file beside this page.",
    ]
    for target in targets:
        of_target = [r for r in rows if r.target == target]
        parts += [f"## Against the long run's {target.replace('_', ' ')}", _table(of_target)]
        budget = best_budget(rows, "validation_loss", target)
        if budget is not None:
            parts.append(f"The validation loss ranks within 0.02 of its best from {budget:.0%} of the steps on.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(rows: list[Agreement]) -> str:
    kinds = list(dict.fromkeys(r.kind for r in rows))
    cells: dict[tuple[str, float], list[str]] = {}
    for r in rows:
        ceiling = "–" if r.ceiling is None else f"{r.ceiling:.2f}"
        budget = "–" if r.budget == 0 else f"{r.budget:.1%}"
        cells.setdefault((r.score, r.budget), [r.score.replace("_", " "), budget, ceiling])
        cells[r.score, r.budget].append("–" if r.rho is None else f"{r.rho:.2f}".replace("-", "−"))
    return tables.markdown(["score", "budget", "ceiling", *kinds], list(cells.values()))


def figure(rows: list[Agreement], target: str) -> Figure:
    """Agreement as it is with one target by budget: a line per score, a dot for scores of the end alone."""
    shown = [r for r in rows if (r.target, r.kind) == (target, AS_IS) and r.rho is not None and r.budget]
    traces = []
    for i, score in enumerate(dict.fromkeys(r.score for r in shown)):
        points = [(r.budget, r.rho.value) for r in shown if r.score == score and r.rho is not None]
        color = COLORS[i % len(COLORS)]
        traces.append(scatter(points, "lines+markers", name=score.replace("_", " "), line={"color": color}))
    layout = {**base_layout("Share of the short run's steps", "Spearman's ρ"), "showlegend": True}
    return {"data": traces, "layout": layout}
