"""Points of a search space of integers and categories as rows of choice indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from archsearch.stats.regression import Array

Rows = NDArray[np.int64]
Params = Mapping[str, Any]

MUTATIONS = 300
"""Mutations of the best points per pool."""


@dataclass(frozen=True)
class Grid:
    """Points of a search space as rows of choice indices, one column per parameter in the order of their names."""

    space: Mapping[str, BaseDistribution]

    @cached_property
    def names(self) -> list[str]:
        """Names of the parameters, sorted."""
        return sorted(self.space)

    @cached_property
    def choices(self) -> list[list[Any]]:
        """Choices of each parameter.

        Raises:
            ValueError: for a distribution over real numbers.
        """
        found = []
        for name in self.names:
            distribution = self.space[name]
            if isinstance(distribution, CategoricalDistribution):
                found.append(list(distribution.choices))
            elif isinstance(distribution, IntDistribution):
                found.append(list(range(distribution.low, distribution.high + 1, distribution.step)))
            else:
                raise ValueError(f"parameter {name} is neither an integer nor a category")
        return found

    @cached_property
    def counts(self) -> Rows:
        """Number of choices of each parameter."""
        return np.array([len(c) for c in self.choices])

    @cached_property
    def unordered(self) -> NDArray[np.bool_]:
        """Whether each parameter is a category."""
        return np.array([isinstance(self.space[name], CategoricalDistribution) for name in self.names])

    def rows(self, params: Sequence[Params]) -> Rows:
        """Rows of several points."""
        indices = [{choice: i for i, choice in reversed([*enumerate(choices)])} for choices in self.choices]
        columns = [[index[p[name]] for p in params] for name, index in zip(self.names, indices, strict=True)]
        return np.array(columns, dtype=int).reshape(len(self.names), len(params)).T.copy()

    def row(self, params: Params) -> list[int]:
        """Index of the choice of each parameter."""
        return [choices.index(params[name]) for name, choices in zip(self.names, self.choices, strict=True)]

    def params(self, row: Rows) -> dict[str, Any]:
        """Parameters of a row."""
        return {name: c[int(i)] for name, c, i in zip(self.names, self.choices, row, strict=True)}

    def encode(self, rows: Rows) -> Array:
        """Rows as inputs of the model: ordered parameters between 0 and 1, categories as they are."""
        scale = np.where(self.unordered, 1, np.maximum(self.counts - 1, 1))
        encoded: Array = rows / scale
        return encoded

    def random(self, count: int, rng: np.random.Generator) -> Rows:
        """Uniformly random rows."""
        return rng.integers(0, self.counts, size=(count, len(self.counts)))

    def neighbors(self, row: Rows) -> Rows:
        """Rows that differ in one parameter, and by one step if it is ordered."""
        found = [
            [*row[:i], choice, *row[i + 1 :]]
            for i, count in enumerate(self.counts)
            for choice in (range(count) if self.unordered[i] else (row[i] - 1, row[i] + 1))
            if choice != row[i] and 0 <= choice < count
        ]
        return np.array(found, dtype=int).reshape(-1, len(row))

    def mutations(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Random changes of each parameter of random rows, with a probability that changes two on average."""
        parents = rows[rng.integers(0, len(rows), MUTATIONS)]
        changed = rng.random(parents.shape) < 2 / parents.shape[1]
        mutated: Rows = np.where(changed, self.random(MUTATIONS, rng), parents)
        return mutated

    def unique(self, rows: Rows, known: Rows | None = None) -> Rows:
        """Rows without repetitions, in order, and without the known ones."""
        found = {row.tobytes(): row for row in rows}
        for row in () if known is None else known:
            found.pop(row.tobytes(), None)
        return np.array([*found.values()], dtype=int).reshape(-1, rows.shape[1])
