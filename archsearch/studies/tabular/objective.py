"""A table as an Optuna objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optuna import Trial, TrialPruned

from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable, mean_scores
from snapgen.errors import InputError

SECONDS = "seconds"
"""User attribute of a trial with the seconds that its runs took."""


def objective(
    table: BenchmarkTable,
    names: Sequence[str] = ("validation_loss", "latency_ms"),
    *,
    seeds: Sequence[int] | None = None,
) -> Callable[[Trial], tuple[float, ...]]:
    """An objective that looks its values up, for ``optuna.create_study(directions=["minimize", …])``.

    It asks for every knob, ordered ones as integers and others as categories, by the index of the choice. A trial whose
    choices are not valid in combination, or whose training diverged, is pruned. The user attribute ``seconds`` of a
    trial is the time that its training took.

    Args:
        names: numbers to minimize: scores of the short runs, ``latency_ms``, costs, or a profile of the predicted
            latencies.
        seeds: seeds of the runs whose mean a score is; None: the first of the table's.

    Raises:
        InputError: if a name or a seed is not in the table.
    """
    seeds = table.seeds[:1] if seeds is None else tuple(seeds)
    if unknown := [seed for seed in seeds if seed not in table.seeds]:
        raise InputError(table.source, f"has no seed {unknown[0]}", f"use {', '.join(map(str, table.seeds))}")
    lower_is_better = (name for name, is_lower in LOWER_IS_BETTER.items() if is_lower)
    known = [*lower_is_better, "latency_ms", "params", "macs", *table.header.profiles]
    for name in names:
        if name not in known:
            raise InputError(table.source, f"has no objective {name!r:.60}", f"use {', '.join(known)}")

    def evaluate(trial: Trial) -> tuple[float, ...]:
        point = {
            knob.name: trial.suggest_int(knob.name, 0, len(knob.choices) - 1)
            if knob.ordered
            else trial.suggest_categorical(knob.name, range(len(knob.choices)))
            for knob in table.space.knobs
        }
        if not table.space.valid(point):
            raise TrialPruned
        entry = table.entries[table.space.architecture(point).id]
        runs = [table.short_runs[entry.id][seed] for seed in seeds]
        trial.set_user_attr(SECONDS, sum(run.seconds for run in runs))
        scores = mean_scores(runs)
        if any(name in LOWER_IS_BETTER and name not in scores for name in names):
            raise TrialPruned
        return tuple(scores[name] if name in LOWER_IS_BETTER else entry.number(name) for name in names)

    return evaluate
