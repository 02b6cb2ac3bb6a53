"""Known numbers of thousands of points from exact ones of a few hundred."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from archsearch.samplers.grid import Grid, Params, Rows
from archsearch.stats.regression import Array

COUNTED = 300
"""Random points at which the numbers are computed to predict them elsewhere."""

MOST_TRIES = 5000
"""Random points that are tried for as many valid ones."""

INTERACTION = 0.3
"""Expected size of the interaction of two parameters, relative to the effect of one."""

RIDGE = 1e-3
"""Variance of what neither effects nor interactions explain, relative to that of one effect."""

KnownNumbers = Callable[[Params], Mapping[str, float] | None]
"""Numbers of a point that are known before it is tried, all positive; None if the point is invalid."""


class Screening:
    """Exact known numbers, each computed once, and a regression of their logarithms on the parameters.

    The regression is fitted to a sample that depends only on the search space, so that every process of a study
    predicts the same.

    Args:
        known: the known numbers of a point.
        counted: number of points to compute them at.
    """

    def __init__(self, known: KnownNumbers, counted: int = COUNTED) -> None:
        self._known, self._counted = known, counted
        self._exact: dict[tuple[str, ...], Mapping[str, float] | None] = {}
        self._regressions: dict[tuple[str, ...], ChoiceRegression] = {}
        self.observed: dict[Any, dict[int, Any]] = {}
        """What the sampler derived from the trials of its last suggestion, by their `id`."""

    def learn(self, params: Params, numbers: Mapping[str, float]) -> None:
        """Use these numbers of a point, which need not be computed then."""
        self._exact[_key(params)] = numbers

    def at(self, grid: Grid, row: Rows) -> Mapping[str, float] | None:
        """Exact numbers of one point; None if it is invalid."""
        params = grid.params(row)
        key = _key(params)
        if key not in self._exact:
            self._exact[key] = self._known(params)
        return self._exact[key]

    def exact(self, grid: Grid, rows: Rows) -> dict[str, Array]:
        """Exact numbers of valid points, by name.

        Raises:
            ValueError: if one is invalid.
        """
        found = [numbers for row in rows if (numbers := self.at(grid, row)) is not None]
        if len(found) < len(rows):
            raise ValueError("a trial's parameters are no valid point")
        return {name: np.array([numbers[name] for numbers in found]) for name in (found[0] if found else ())}

    def predict(self, grid: Grid, rows: Rows) -> dict[str, Array]:
        """Predicted numbers of many points, by name."""
        return self.regression(grid).predict(rows)

    def regression(self, grid: Grid) -> ChoiceRegression:
        """The regression on the choices of a search space."""
        key = (*grid.names, *map(str, grid.choices))
        if key not in self._regressions:
            rows = self.sample(grid, lambda row: self.at(grid, row) is not None)
            self._regressions[key] = ChoiceRegression.fit(rows, self.exact(grid, rows))
        return self._regressions[key]

    def sample(self, grid: Grid, valid: Callable[[Rows], bool]) -> Rows:
        """The random points at which the numbers are computed, the same for every process."""
        drawn = grid.unique(grid.random(MOST_TRIES, np.random.default_rng(0)))
        kept = (row for row in drawn if valid(row))
        return np.array([*itertools.islice(kept, self._counted)], dtype=int).reshape(-1, drawn.shape[1])


def _key(params: Params) -> tuple[str, ...]:
    names = sorted(params)
    return (*names, *(str(params[name]) for name in names))


@dataclass(frozen=True)
class ChoiceRegression:
    """Ridge regression of logarithms on indicators of choices and of pairs of choices, in its dual form.

    Attributes:
        rows: points that it was fitted to.
        largest: largest number among them, by name.
    """

    rows: Rows
    largest: Mapping[str, float]
    means: Array
    weights: Array

    @classmethod
    def fit(cls, rows: Rows, numbers: Mapping[str, Array]) -> ChoiceRegression:
        """Fit to the numbers at some points."""
        largest = {name: float(column.max()) for name, column in numbers.items()}
        logs = np.log(np.array([*numbers.values()])).reshape(len(numbers), len(rows)).T
        means = logs.mean(axis=0)
        weights = np.linalg.solve(_kernel(rows, rows) + RIDGE * np.eye(len(rows)), logs - means)
        return cls(rows, largest, means, weights)

    def predict(self, rows: Rows) -> dict[str, Array]:
        """Predicted numbers at other points, by name."""
        found = np.exp(self.means + _kernel(rows, self.rows) @ self.weights)
        return {name: found[:, i] for i, name in enumerate(self.largest)}


def _kernel(a: Rows, b: Rows) -> Array:
    """Number of the choices that two points share, plus that of the pairs of choices, weighted."""
    shared = (a[:, None, :] == b[None, :, :]).sum(axis=2)
    kernel: Array = (shared + INTERACTION**2 * shared * (shared - 1) / 2) / a.shape[1]
    return kernel
