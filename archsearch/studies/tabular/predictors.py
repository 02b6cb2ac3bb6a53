"""How many scored architectures a predictor of quality needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from archsearch.samplers.grid import Grid, Rows
from archsearch.samplers.surrogate import Columns, fit
from archsearch.stats.medians import Median, median
from archsearch.stats.regression import Array
from archsearch.studies.search.samplers import distributions
from archsearch.studies.tabular.effects import run_noise
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.seeding import derive_seed

LABELS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of architectures that predictors are fitted to."""

DRAWS = 10
"""Random sets of each number."""

SPLITS = ("depth", "width")
"""Knobs by whose choice the architectures are split: fitted to the base's, tested on the others."""

METRIC = "validation_loss"
"""The score that is predicted."""

IN_DISTRIBUTION = "in distribution"

RIDGE = 0.1
"""Ratio of the noise's variance to that of an effect, in the regression."""


def splits(table: BenchmarkTable) -> dict[str, dict[str, str]]:
    """Splits of each architecture by id, for predictors that are to be compared.

    By a hash of the id seven tenths are ``train``, one is ``validation`` and two are ``test``. Out of distribution, the
    architectures with the base's choice of a knob of `SPLITS` are ``train``, the others ``test``.
    """
    base = table.space.base_point
    found = {}
    for arch_id, entry in table.entries.items():
        tenth = derive_seed(0, "split", arch_id) % 10
        knobs = {k: "train" if entry.point[k] == base[k] else "test" for k in SPLITS if k in base}
        found[arch_id] = {"split": "train" if tenth < 7 else "validation" if tenth < 8 else "test", **knobs}
    return found


@dataclass(frozen=True)
class Prediction:
    """How well a predictor ranks architectures that it was not fitted to.

    Attributes:
        model: ``main effects``, or the ``Gaussian process`` of the sampler ehvi.
        split: ``in distribution``, or the knob whose other choices it is tested on.
        labels: number of architectures that it was fitted to, with one run each.
        rho: Spearman's rank correlation with the mean over all runs, over random sets.
    """

    model: str
    split: str
    labels: int
    rho: Median


def predictions(table: BenchmarkTable, metric: str = METRIC) -> list[Prediction]:
    """Rank correlations of both models for every number of labels that the table allows."""
    truth = table.true_values(metric)
    ids = [arch_id for arch_id in table.entries if arch_id in truth]
    grid = Grid(distributions(table.space.knobs))
    rows = grid.rows([table.entries[i].point for i in ids])
    true = np.array([truth[i] for i in ids])
    labels = np.array([table.short_runs[i][table.seeds[0]].scores[metric] for i in ids])
    noise = np.full(len(ids), run_noise(table, metric) ** 2)
    found = []
    for split, known, tested in _splits(table, ids):
        for count in LABELS:
            if count >= len(known):
                continue
            rng = np.random.default_rng(derive_seed(0, "labels", split, count))
            rhos: dict[str, list[float]] = {"main effects": [], "Gaussian process": []}
            for _ in range(DRAWS):
                chosen = rng.choice(known, count, replace=False)
                rest = np.setdiff1d(tested, chosen)
                inputs = (grid, rows[chosen], labels[chosen], noise[chosen], rows[rest])
                for name, model in (("main effects", _main_effects), ("Gaussian process", _gaussian_process)):
                    rho = float(spearmanr(model(*inputs), true[rest]).statistic)
                    rhos[name].append(rho if np.isfinite(rho) else 0.0)
            found += [Prediction(name, split, count, median(values)) for name, values in rhos.items()]
    return found


def _splits(table: BenchmarkTable, ids: Sequence[str]) -> list[tuple[str, Rows, Rows]]:
    """Name of each split, and indices of the architectures that may be fitted to, and of those that are tested."""
    everything = np.arange(len(ids))
    splits = [(IN_DISTRIBUTION, everything, everything)]
    base: Mapping[str, int] = table.space.base_point
    for knob in SPLITS:
        if knob in base:
            is_base = np.array([table.entries[i].point[knob] == base[knob] for i in ids])
            splits.append((knob, everything[is_base], everything[~is_base]))
    return splits


def _main_effects(grid: Grid, rows: Rows, values: Array, noise: Array, tested: Rows) -> Array:  # noqa: ARG001
    """Ridge regression on indicators of the choices."""

    def indicators(rows: Rows) -> Array:
        return np.hstack([np.eye(int(n))[column] - 1 / n for n, column in zip(grid.counts, rows.T, strict=True)])

    x, mean = indicators(rows), values.mean()
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (values - mean))
    return np.asarray(mean + indicators(tested) @ weights, dtype=np.float64)


def _gaussian_process(grid: Grid, rows: Rows, values: Array, noise: Array, tested: Rows) -> Array:
    columns = Columns(unordered=grid.unordered, linear=np.zeros(len(grid.names), dtype=bool))
    return fit(columns, grid.encode(rows), values, noise).predict(grid.encode(tested))
