"""Page of the factorial ablation: effects of every choice, interactions, and how often published rows come out."""

from __future__ import annotations

from collections.abc import Mapping

import pandas

from archsearch.reports.rendering import formatting, tables
from archsearch.reports.rendering.plotting import Figure, base_layout, error_bars, scatter
from archsearch.reports.tabular.labels import effect, effect_cell, is_relative, label
from archsearch.reports.tabular.published import beside_the_paper, from_few_seeds
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
    """Every effect, and every interaction on a score: a row each.

    ``low`` and ``high`` are those of a 95 % interval, and of what is counted or predicted the smallest and the largest
    effect; ``seeds``, ``complete`` and ``between`` are as in `OverSeeds`.
    """
    rows: list[dict[str, object]] = []
    for name, fit in found.items():
        for change, size in fit.main.items():
            rows.append({"number": name, "change": str(change), **_columns(size, name)})
            if (over := fit.over_seeds.get(change)) is not None:
                rows[-1] |= vars(over)
        if not is_relative(name):
            for (a, b), size in fit.interactions.items():
                rows.append({"number": name, "change": f"{a} × {b}", **_columns(size, name)})
    return pandas.DataFrame(rows)


def _columns(size: Estimate, name: str) -> dict[str, object]:
    return {"relative": is_relative(name), **effect(size, name).model_dump(include=ENDS)}


ENDS = {"value", "low", "high"}


def markdown(table: BenchmarkTable, found: Mapping[str, FactorialFit]) -> str:
    """The page, from what `fits` gave."""
    scores = scores_of(table)
    some = found[scores[0]]
    published = published_changes(table)
    parts = [
        "# The factorial ablation",
        f"{_architectures(table, some.n)}, each trained with {_seeds(table)}. An effect is an average over all choices "
        f"of the other knobs: of a score with its 95 % interval, which {_what_intervals_hold_for(some)}; costs and "
        "latencies are relative changes: of the measured latency with its interval, of what is counted or predicted in "
        "parentheses from the smallest to the largest over the choices of the other knobs. Latencies named after a "
        "phone are *predicted*, of the full-size twins. Better, worse or open is what the paper's ablation says of a "
        "row's quality.",
        tables.markdown(
            ["change", "SnapGen's row", *(label(name) for name in found)],
            _effect_rows(found, published),
            text_columns=2,
        ),
        *beside_the_paper(found, published),
        *_over_seeds(table, {name: found[name] for name in scores}),
        "## Interactions",
        "By how much the effect of one change changes once another one is made, the clearest first; the intervals are "
        "of the seeds that all architectures have, not of others. Main effects and interactions of two knobs together "
        "explain so much of the variance between architectures:",
        tables.markdown(
            ["score", "mean", "explained", "standard deviation of the rest"],
            [
                [
                    label(name),
                    formatting.number(fit.mean),
                    f"{100 * fit.explained:.1f}{formatting.NBSP}%",
                    f"{fit.residual:.3g}",
                ]
                for name, fit in found.items()
                if name in scores
            ],
        ),
    ]
    for name in scores:
        parts += [f"### {label(name).capitalize()}", _interactions(found[name])]
    parts += from_few_seeds(table, scores, published)
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
    sizes = [effect(fit.main[change], name) for change in changes]
    points = [(size.value, str(change)) for size, change in zip(sizes, changes, strict=True)]
    layout = base_layout("Relative change" if is_relative(name) else "Change, lower is better", "")
    zero = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "var(--line)"}}
    layout["xaxis"] |= {"tickformat": ".0%"} if is_relative(name) else {}
    layout["yaxis"] |= {"type": "category", "dtick": 1}  # a label for every change
    trace = scatter(points, marker={"color": "var(--front)"}, error_x=error_bars(sizes, "var(--front)"))
    return {"data": [trace], "layout": {**layout, "shapes": [zero]}}


def _architectures(table: BenchmarkTable, trained: int) -> str:
    """How many architectures have scores, of how many."""
    if trained == len(table.entries):
        return f"{trained:,} architectures, every combination of the choices"
    return f"{trained:,} of the {len(table.entries):,} combinations of the choices (the others diverged)"


def _seeds(table: BenchmarkTable) -> str:
    own = len(table.seeds)
    more = [count for by_seed in table.short_runs.values() if (count := len(by_seed)) > own]
    further = f", {len(more)} of them with up to {max(more)}" if more else ""
    return f"{own} seed{'s' if own > 1 else ''}{further}"


def _what_intervals_hold_for(fit: FactorialFit) -> str:
    if fit.over_seeds:
        return "allows for other seeds, whose draws suit some choices better than others"
    return "is of this one seed: what another would say, one seed cannot tell"


def _over_seeds(table: BenchmarkTable, found: Mapping[str, FactorialFit]) -> list[str]:
    """How the effects on each score came out over seeds; nothing with a single seed."""
    if not any(fit.over_seeds for fit in found.values()):
        return []
    own = f"seeds {' and '.join(map(str, table.seeds))}"
    rows = []
    for name, fit in found.items():
        for change, over in fit.over_seeds.items():
            sizes = (f"{size:+.3g}".replace("-", "−") for size in (fit.main[change].value, over.complete))
            rows.append([label(name), str(change), str(over.seeds), *sizes, f"{over.between:.2g}"])
    text = (
        "A mean over all seeds (a random-effects meta-analysis: a seed that only some architectures have counts less) "
        f"is not the mean over {own}, which all architectures have and anybody can take from "
        "the table. The more a change's effect differs between seeds, the further apart the two are:"
    )
    header = ["score", "change", "seeds", "mean over them", f"{own} alone", "standard deviation between seeds"]
    return ["## From seed to seed", text, tables.markdown(header, rows, text_columns=2)]


def _effect_rows(found: Mapping[str, FactorialFit], published: list[PublishedChange]) -> list[list[str]]:
    changes = next(iter(found.values())).main
    said = {p.change: f"{p.row}: {p.direction or 'open'}" for p in published}
    return [
        [
            str(change),
            said.get(change, "–"),
            *(effect_cell(fit.main[change], name) for name, fit in found.items()),
        ]
        for change in changes
    ]


def _interactions(fit: FactorialFit) -> str:
    rows = [
        [str(a), str(b), formatting.format_change(size, relative=False)]
        for (a, b), size in list(fit.interactions.items())[:INTERACTIONS]
    ]
    return tables.markdown(["the effect of", "once made:", "changes by"], rows, text_columns=2)


def _fresh(table: BenchmarkTable, scores: list[str]) -> list[str]:
    """How far verdicts from fresh seeds on a few architectures agree; nothing without such seeds."""
    found = {name: each for name in scores if (each := fresh_verdicts(table, name)) is not None}
    if not found:
        return []
    some = next(iter(found.values()))
    text = (
        f"Would others come to the same verdicts? {some.changes} changes are judged again on {some.architectures} "
        f"architectures with a fresh pair of seeds, {_times(some.pairs)}, and each time held against what all other "
        "runs say. Of the verdicts better or worse by all other runs, some are too small for the few architectures to "
        "tell; of those that they tell, so many are the same:"
    )
    rows = [
        [label(name), str(each.found), str(each.called), f"{each.agreeing} of {each.called}"]
        for name, each in found.items()
    ]
    header = ["score", "better or worse by all other runs", "of these told by the fresh pair", "the same"]
    return ["## From fresh seeds", text, tables.markdown(header, rows)]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _noise(table: BenchmarkTable, scores: list[str]) -> str:
    rows = []
    for name in scores:
        for source, noise in noise_by_source(table, name).items():
            deviation = formatting.format_interval(noise.deviation)
            rows.append([label(name), source, str(noise.architectures), str(noise.runs), deviation])
    text = (
        "Standard deviation between runs of an architecture, without what a seed does to all of them, with its 95 % "
        "interval: where a seed varies all that is random, or the initial weights, the order of the images or the "
        "noise alone. The first is over more architectures than the others."
    )
    header = ["score", "varied", "architectures", "runs", "standard deviation"]
    return f"{text}\n\n{tables.markdown(header, rows, text_columns=2)}"


def _pooled(table: BenchmarkTable, scores: list[str]) -> list[str]:
    """How far a study's pooled intervals hold; nothing without further seeds."""
    found = {name: shares for name in scores if (shares := pooled_coverage(table, name))}
    if not found:
        return []
    text = (
        "A study's 95 % intervals rest on one spread between seeds, pooled over all candidates. How often does such an "
        f"interval of a study with {POOLED} seeds hold the difference between two architectures that their other seeds "
        "show? Of all pairs of architectures, and of those that differ in a knob:"
    )
    knobs = next(iter(found.values()))
    rows = [[knob, *(formatting.percent(shares[knob]) for shares in found.values())] for knob in knobs]
    return ["## How far pooled intervals hold", text, tables.markdown(["knob", *map(label, found)], rows)]
