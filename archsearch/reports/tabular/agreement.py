"""Page of rank agreement: which score of a short run, from which budget, ranks as longer or larger runs do."""

from __future__ import annotations

import pandas

from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure, lines
from archsearch.reports.tabular.labels import label
from archsearch.stats.rank_correlation import FIT
from archsearch.studies.tabular.agreement import AS_IS, Agreement, best_budget, ceilings, is_of_a_range, sample_errors
from archsearch.studies.tabular.table import BenchmarkTable

COLUMNS = ("score", "budget", "reference", "target", "kind", "n", "rho", "low", "high", "ceiling")


def frame(rows: list[Agreement]) -> pandas.DataFrame:
    """Every agreement: a row each."""
    return pandas.DataFrame(
        columns=COLUMNS,
        data=[
            {
                "score": r.score,
                "budget": r.budget,
                "reference": r.reference,
                "target": r.target,
                "kind": r.kind,
                "n": r.n,
                "rho": r.rho and r.rho.value,
                "low": r.rho and r.rho.low,
                "high": r.rho and r.rho.high,
                "ceiling": r.ceiling,
            }
            for r in rows
        ],
    )


def groups(rows: list[Agreement]) -> dict[str, list[Agreement]]:
    """The agreements with each score of the other runs, by its label, e.g. ``validation loss of 2,400 steps``."""
    found: dict[str, list[Agreement]] = {}
    for r in rows:
        found.setdefault(f"{label(r.target)} of {r.reference}", []).append(r)
    return found


def markdown(table: BenchmarkTable, rows: list[Agreement]) -> str:
    """The page; without other runs it has the noise ceiling alone, and says so."""
    parts = ["# Which score, from which budget", "## Noise ceiling", *_ceilings(table)]
    if not rows:
        return "\n\n".join([*parts, "The table has no longer runs to compare with."]) + "\n"
    parts += _sample_errors(table)
    parts += [
        "## Ranking as longer runs do",
        "Spearman's ρ, with its 95 % interval, of scores of the short run with those of longer runs, or of runs on "
        "larger images. Budget: share of the short run's steps. Ceiling: the noise ceiling of these architectures. t1 "
        "to t4 are ranges of timesteps, from the least noise to the most, at other budgets in the CSV file beside this "
        f"page. A score is *fit to rank*, in bold, where the whole interval lies above {FIT}.",
    ]
    for name, of_target in groups(rows).items():
        parts += [f"## Against the {name}, {of_target[0].n} architectures", _table(of_target)]
        budget = best_budget(of_target, "validation_loss")
        if budget is not None:
            parts.append(f"The validation loss ranks within 0.02 of its best from {budget:.0%} of the steps on.")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _ceilings(table: BenchmarkTable) -> list[str]:
    """Lines on how much of a perfect ranking the noise of the table's seeds leaves."""
    seeds = ", ".join(map(str, table.seeds))
    text = (
        f"How far the mean of a score over the table's seeds ({seeds}) ranks all architectures as its mean over "
        "endless seeds would (Spearman and Brown): the most that a perfect prediction of it can reach."
    )
    found = {key: known for key, known in ceilings(table).items() if not is_of_a_range(key[0])}
    rows = [
        [label(score), f"{budget:.1%}", str(count), "–" if ceiling is None else f"{ceiling:.3f}"]
        for (score, budget), (count, ceiling) in found.items()
    ]
    return [text, tables.markdown(["score", "budget", "architectures", "ceiling"], rows)]


def _sample_errors(table: BenchmarkTable) -> list[str]:
    """The section on how far a sample of architectures tells what all would; nothing without two seeds."""
    found = sample_errors(table)
    if not found:
        return []
    some = found[0]
    text = (
        f"Longer runs are known of {some.sampled} architectures. How far would all {len(table.entries)} say something "
        "else? Between two seeds of the short runs it is known: each cell has the ρ of one seed's score with the "
        "other's end score over all architectures, the distance from it within which 95 % of random samples of "
        f"{some.sampled} lie, and in parentheses by how much these {some.sampled}, chosen for balance, miss it. The "
        "intervals below are Fisher's, which are wider, for they know nothing of how many architectures there are."
    )
    targets = list(dict.fromkeys(e.target for e in found))
    cells: dict[tuple[str, float], list[str]] = {}
    for e in found:
        row = cells.setdefault((e.score, e.budget), [label(e.score), f"{e.budget:.1%}"])
        row.append(f"{e.rho:.2f} ± {e.spread:.2f} ({e.chosen:+.2f})".replace("-", "−"))
    header = ["score", "budget", *(f"{label(target)} of the other seed" for target in targets)]
    return ["## How far a sample tells it", text, tables.markdown(header, [*cells.values()])]


def _table(rows: list[Agreement]) -> str:
    kinds = list(dict.fromkeys(r.kind for r in rows))
    cells: dict[tuple[str, float], list[str]] = {}
    for r in rows:
        if is_of_a_range(r.score) and r.budget < 1:
            continue
        ceiling = "–" if r.ceiling is None else f"{r.ceiling:.2f}"
        budget = "–" if r.budget == 0 else f"{r.budget:.1%}"
        cells.setdefault((r.score, r.budget), [label(r.score), budget, ceiling])
        cells[r.score, r.budget].append(_cell(r))
    return tables.markdown(["score", "budget", "ceiling", *kinds], list(cells.values()))


def _cell(r: Agreement) -> str:
    if r.rho is None:
        return "–"
    shown = f"{r.rho.value:.2f} [{r.rho.low:.2f}, {r.rho.high:.2f}]".replace("-", "−")
    return f"**{shown}**" if r.rho.low > FIT else shown


def figures(rows: list[Agreement]) -> dict[str, Figure]:
    """Agreement as it is by budget, with a target each: a line per score, a dot for scores of the end alone."""
    return {f"Against the {name}": _figure(of_target) for name, of_target in groups(rows).items()}


def _figure(rows: list[Agreement]) -> Figure:
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r.kind == AS_IS and r.rho is not None and r.budget and not is_of_a_range(r.score):
            found.setdefault(label(r.score), []).append((r.budget, r.rho.value))
    return lines(found, "Share of the short run's steps", "Spearman's ρ", "lines+markers")
