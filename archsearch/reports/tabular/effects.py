"""Page of the factorial ablation: effects of every choice, interactions, and how often published rows come out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas

from archsearch.reports.rendering import formatting, tables
from archsearch.reports.rendering.plotting import Figure, base_layout, error_bars, scatter
from archsearch.reports.tabular.labels import label
from archsearch.stats.estimate import Estimate
from archsearch.stats.factorial import FactorialFit
from archsearch.studies.tabular.effects import (
    POOLED,
    PublishedChange,
    effects_on,
    fresh_verdicts,
    noise_by_source,
    pooled_coverage,
    published_changes,
    reproduction,
)
from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable

INTERACTIONS = 8
"""Number of interactions shown, the strongest first."""


def scores_of(table: BenchmarkTable) -> list[str]:
    """The scores that all short runs have."""
    runs = [run for by_seed in table.short_runs.values() for run in by_seed.values() if not run.diverged]
    return [name for name in LOWER_IS_BETTER if runs and all(name in run.scores for run in runs)]


def _costs_of(table: BenchmarkTable) -> list[str]:
    large = ["full_size_params", "full_size_macs", *table.header.profiles] if table.header.full_size else []
    return ["params", "macs", "latency_ms", *large]


def fits(table: BenchmarkTable) -> dict[str, FactorialFit]:
    """Effects on every score, cost and latency of a table."""
    return {name: effects_on(table, name) for name in (*scores_of(table), *_costs_of(table))}


def frame(found: Mapping[str, FactorialFit]) -> pandas.DataFrame:
    """Every effect and interaction: a row each."""
    rows = []
    for name, fit in found.items():
        effects = {str(change): size for change, size in fit.main.items()}
        effects |= {f"{a} × {b}": size for (a, b), size in fit.interactions.items()}
        for change, size in effects.items():
            shown = _shown(size, name).model_dump(include=ENDS)
            rows.append({"number": name, "change": change, "relative": _is_relative(name), **shown})
    return pandas.DataFrame(rows)


ENDS = {"value", "low", "high"}


def _is_relative(name: str) -> bool:
    return name not in LOWER_IS_BETTER


def _shown(size: Estimate, name: str) -> Estimate:
    """An effect on a number; one on a logarithm as a relative change."""
    if not _is_relative(name):
        return size
    return Estimate(value=math.expm1(size.value), low=math.expm1(size.low), high=math.expm1(size.high))


def markdown(table: BenchmarkTable, found: Mapping[str, FactorialFit]) -> str:
    """The page, from what `fits` gave."""
    scores = scores_of(table)
    some = found[scores[0]]
    published = published_changes(table)
    parts = [
        "# The factorial ablation",
        f"{some.n:,} architectures, every combination of the choices, each trained with {len(table.seeds)} seeds"
        f"{_further_seeds(table)}. An effect is an average over all choices of the other knobs, with its 95 % "
        "interval; that of a score allows for other seeds, whose draws suit some choices better than others. Costs and "
        "latencies are relative. Latencies named after a phone are *predicted*, of the full-size twins. Better, worse "
        "or open is what the paper's ablation says of a row's quality.",
        tables.markdown(
            ["change", "SnapGen's row", *(label(name) for name in found)],
            _effect_rows(found, published),
            text_columns=2,
        ),
        "Mean, share of the variance that main effects and interactions of two knobs explain, deviation of the rest:",
        tables.markdown(
            ["score", "mean", "explained", "rest"],
            [
                [label(name), formatting.number(fit.mean), formatting.percent(fit.explained), f"{fit.residual:.3g}"]
                for name, fit in found.items()
                if name in scores
            ],
        ),
        "By how much the effect of one change differs after another one; the intervals are of the seeds that all "
        "architectures have, not of others.",
    ]
    for name in scores:
        parts += [f"## Interactions: {label(name)}", _interactions(found[name])]
    parts += ["## From few seeds", *_from_few_seeds(table, scores, published)]
    parts += _fresh(table, scores)
    parts += ["## Where chance comes from", _noise(table, scores)]
    parts += _pooled(table, scores)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def figures(table: BenchmarkTable, found: Mapping[str, FactorialFit]) -> dict[str, Figure]:
    """Main effects with their intervals on every score, and on the latency of the machine and of each phone."""
    wanted = [*scores_of(table), "latency_ms", *table.header.profiles]
    return {label(name): _figure(found[name], name) for name in wanted if name in found}


def _figure(fit: FactorialFit, name: str) -> Figure:
    changes = [*fit.main][::-1]  # plotly's axis goes up
    sizes = [_shown(fit.main[change], name) for change in changes]
    points = [(size.value, str(change)) for size, change in zip(sizes, changes, strict=True)]
    layout = base_layout("Relative change" if _is_relative(name) else "Change, lower is better", "")
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "var(--line)"}}
    layout["xaxis"] |= {"tickformat": ".0%"} if _is_relative(name) else {}
    layout["yaxis"] |= {"type": "category", "dtick": 1}  # a label for every change
    trace = scatter(points, marker={"color": "var(--front)"}, error_x=error_bars(sizes, "var(--front)"))
    return {"data": [trace], "layout": {**layout, "shapes": [zero]}}


def _further_seeds(table: BenchmarkTable) -> str:
    counts = [len(by_seed) for by_seed in table.short_runs.values()]
    more = [count for count in counts if count > len(table.seeds)]
    return f", {len(more)} of them with up to {max(more)}" if more else ""


def _effect_rows(found: Mapping[str, FactorialFit], published: list[PublishedChange]) -> list[list[str]]:
    changes = next(iter(found.values())).main
    said = {p.change: f"{p.row}: {p.direction or 'open'}" for p in published}
    return [
        [
            str(change),
            said.get(change, "–"),
            *(
                formatting.format_change(_shown(fit.main[change], name), relative=_is_relative(name))
                for name, fit in found.items()
            ),
        ]
        for change in changes
    ]


def _interactions(fit: FactorialFit) -> str:
    rows = [
        [str(a), str(b), formatting.format_change(size, relative=False)]
        for (a, b), size in list(fit.interactions.items())[:INTERACTIONS]
    ]
    return tables.markdown(["effect of", "is larger after", "by"], rows, text_columns=2)


def _from_few_seeds(table: BenchmarkTable, scores: list[str], published: list[PublishedChange]) -> list[str]:
    rows = []
    for each in published:
        for name in scores:
            found = reproduction(table, each, name)
            if found is None:
                continue
            shares = (found.observed, found.one_seed, found.three_seeds)
            row = f"{each.row}: {each.title}"
            rows.append([row, str(each.direction), label(name), str(found.contexts), *map(formatting.percent, shares)])
    text = (
        "How often a row would come out with the published sign, if two architectures that differ in it alone were "
        "compared: counted over all contexts and single seeds, and calculated for one seed and for three from the "
        "spread between contexts and the noise of a run."
    )
    header = ["row", "published", "score", "contexts", "counted", "one seed", "three seeds"]
    return [text, tables.markdown(header, rows, text_columns=3)]


def _fresh(table: BenchmarkTable, scores: list[str]) -> list[str]:
    """How far verdicts from fresh seeds on a few architectures agree; nothing without such seeds."""
    found = {name: each for name in scores if (each := fresh_verdicts(table, name)) is not None}
    if not found:
        return []
    some = next(iter(found.values()))
    text = (
        f"The same changes, judged by the main effects on {some.architectures} architectures with {some.pairs} fresh "
        f"pair{'s' if some.pairs > 1 else ''} of seeds, against the table's verdicts without the pair:"
    )
    rows = [
        [label(name), str(each.found), str(each.called), f"{each.agreeing} of {each.called}"]
        for name, each in found.items()
    ]
    header = ["score", "better or worse by the table", "of these by the fresh pair, too", "with the same verdict"]
    return ["## From fresh seeds", text, tables.markdown(header, rows)]


def _noise(table: BenchmarkTable, scores: list[str]) -> str:
    rows = []
    for name in scores:
        for source, deviation in noise_by_source(table, name).items():
            rows.append([label(name), source, f"{deviation:.3g}"])
    text = "Standard deviation between runs of an architecture, without what a seed does to all of them:"
    return f"{text}\n\n{tables.markdown(['score', 'varied', 'deviation'], rows, text_columns=2)}"


def _pooled(table: BenchmarkTable, scores: list[str]) -> list[str]:
    """How far a study's pooled intervals hold; nothing without further seeds."""
    found = {name: shares for name in scores if (shares := pooled_coverage(table, name))}
    if not found:
        return []
    text = (
        "A study's 95 % intervals take the spread between seeds to be the same for all candidates. With "
        f"{POOLED} seeds they hold the difference of two architectures that other seeds see so often, by the knob in "
        "which the two differ, among others:"
    )
    knobs = next(iter(found.values()))
    rows = [[knob, *(formatting.percent(shares[knob]) for shares in found.values())] for knob in knobs]
    return ["## How far pooled intervals hold", text, tables.markdown(["knob", *map(label, found)], rows)]
