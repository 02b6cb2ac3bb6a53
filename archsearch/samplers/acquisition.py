"""Value of trying a point: the model of the expensive objective, and the hypervolume improvement that it expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr

from archsearch.samplers.grid import Grid, Rows
from archsearch.samplers.surrogate import Columns, Conditional, GaussianProcess, fit
from archsearch.stats.pareto import non_dominated
from archsearch.stats.regression import Array

DRAWS = 16
"""Joint posterior draws over which the improvement is averaged."""

FEWEST_FOR_FEATURES = 8
"""Values before the known numbers are considered as inputs of the model."""

MARGIN = 0.1
"""Distance of the reference from the worst value of the expensive objective, in standard deviations of its values."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a process at rows of a grid: their choices, and standardized logarithms of known numbers.

    Attributes:
        features: names of those numbers.
    """

    grid: Grid
    features: tuple[str, ...]
    centers: Array
    deviations: Array

    @classmethod
    def of(cls, grid: Grid, rows: Rows, known: Mapping[str, Array]) -> Inputs:
        """Inputs with all known numbers, standardized by those of some rows."""
        logs = _logs(known, known, len(rows))
        deviations = logs.std(axis=0)
        return cls(grid, tuple(known), logs.mean(axis=0), np.where(deviations > 0, deviations, 1.0))

    @property
    def columns(self) -> Columns:
        """Meaning of the columns."""
        knobs, numbers = len(self.grid.names), len(self.features)
        return Columns(
            unordered=np.concatenate([self.grid.unordered, np.zeros(numbers, bool)]),
            linear=np.arange(knobs + numbers) >= knobs,
        )

    def __call__(self, rows: Rows, known: Mapping[str, Array]) -> Array:
        """The inputs, of shape (rows, columns)."""
        standard = (_logs(known, self.features, len(rows)) - self.centers) / (2 * self.deviations)
        return np.concatenate([self.grid.encode(rows), standard], axis=1)


@dataclass(frozen=True)
class Model:
    """Gaussian process over a grid, with or without known numbers as inputs."""

    inputs: Inputs
    process: GaussianProcess

    @classmethod
    def fit(cls, grid: Grid, rows: Rows, known: Mapping[str, Array], values: Array, variances: Array) -> Model:
        """Fit to values at some rows.

        Args:
            known: numbers of the rows that are inputs.
            variances: variance of the noise of each value.
        """
        inputs = Inputs.of(grid, rows, known)
        return cls(inputs, fit(inputs.columns, inputs(rows, known), values, variances))

    def predict(self, rows: Rows, known: Mapping[str, Array]) -> Array:
        """Mean of the value at each row."""
        return self.process.predict(self.inputs(rows, known))


def choose_model(
    grid: Grid,
    rows: Rows,
    known: Mapping[str, Array],
    values: Array,
    variances: Array,
    *,
    features: bool | None = None,
) -> Model:
    """The model with known numbers as inputs, or without them.

    Args:
        features: whether they are inputs; None: where leave-one-out predictions say so.
    """
    plain = Model.fit(grid, rows, {}, values, variances)
    if not known or features is False or (features is None and len(rows) < FEWEST_FOR_FEATURES):
        return plain
    featured = Model.fit(grid, rows, known, values, variances)
    return featured if features or featured.process.log_density > plain.process.log_density else plain


@dataclass(frozen=True)
class DominatedRegion:
    """Region above a set of points, cut into boxes along the known objectives; all objectives are minimized.

    In each box one level of the modeled objective is dominated: the lowest among the points that are at least as good
    in every known objective. The expected improvement of a candidate is then a sum of one-dimensional ones, each
    weighted by the part of the box that the candidate dominates.

    Attributes:
        edges: for each known objective, the ascending coordinates at which boxes begin, and the reference at the end.
        levels: lowest dominated level of every box, one axis per known objective; at most the reference.
    """

    edges: tuple[Array, ...]
    levels: Array

    @classmethod
    def of(cls, known: Array, modeled: Array, reference: Array) -> DominatedRegion:
        """The region above points.

        Args:
            known: known objectives, of shape (points, objectives).
            modeled: the modeled objective, of shape (points,).
            reference: reference point, the modeled objective last.
        """
        inside = (known < reference[:-1]).all(axis=1) & (modeled < reference[-1])
        known, modeled = known[inside], modeled[inside]
        starts = [np.unique(column) for column in known.T]
        # A box that begins below every point is dominated by none of them: its level is the reference.
        edges = tuple(
            np.concatenate([[-np.inf], column, [limit]]) for column, limit in zip(starts, reference[:-1], strict=True)
        )
        levels = np.full([len(e) - 1 for e in edges], reference[-1])
        for point, value in zip(known, modeled, strict=True):
            corner = tuple(slice(int(np.searchsorted(e[:-1], c)), None) for e, c in zip(edges, point, strict=True))
            levels[corner] = np.minimum(levels[corner], value)
        return cls(edges, levels)

    def expected_improvement(self, known: Array, mean: Array, deviation: Array) -> Array:
        """Expected growth of the dominated volume by each candidate.

        Args:
            known: known objectives of the candidates, of shape (candidates, objectives).
            mean: mean of each candidate's modeled objective, which is normally distributed.
            deviation: its standard deviation.
        """
        weights = np.ones((len(known), 1))
        for edges, column in zip(self.edges, known.T, strict=True):
            widths = np.clip(edges[None, 1:] - np.maximum(edges[None, :-1], column[:, None]), 0, None)
            weights = (weights[:, :, None] * widths[:, None, :]).reshape(len(known), -1)
        levels, box = np.unique(self.levels.reshape(-1), return_inverse=True)  # few levels share many boxes
        by_level = np.zeros((len(known), len(levels)))
        np.add.at(by_level.T, box, weights.T)
        z = (levels[None] - mean[:, None]) / deviation[:, None]
        gain = deviation[:, None] * (z * ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
        total: Array = (by_level * gain).sum(axis=1)
        return total


@dataclass
class Acquisition:
    """Expected hypervolume improvement over the points tried, averaged over joint draws of their true values.

    Args:
        rows: the points tried and those being tried.
        known: their numbers.
        objectives: names of the numbers that are objectives.
        largest: largest value of each that counts as an improvement.
        limits: upper bounds on numbers, by name.
    """

    model: Model
    rows: Rows
    known: Mapping[str, Array]
    objectives: Sequence[str]
    largest: Array
    limits: Mapping[str, float]
    rng: np.random.Generator
    front: Rows = field(init=False)
    """Rows of the front, by the mean of the draws."""

    def __post_init__(self) -> None:
        inputs = self.model.inputs(self.rows, self.known)
        drawn = self.model.process.draws(inputs, DRAWS, self.rng)
        self._conditional = Conditional(self.model.process, inputs, drawn)
        logs = _logs(self.known, self.objectives, len(self.rows))
        within = self._within(self.known, len(self.rows))
        ends = [min(end, self.limits.get(name, end)) for name, end in zip(self.objectives, self.largest, strict=True)]
        inside = np.flatnonzero(within) if within.any() else np.arange(len(self.rows))
        reference = np.append(np.log(ends) + 1e-3, drawn[:, inside].max() + MARGIN)
        self._regions = [DominatedRegion.of(logs[within], values[within], reference) for values in drawn]
        points = [(*map(float, logs[i]), float(drawn[:, i].mean())) for i in inside]
        self.front = self.rows[inside[non_dominated(points)]]

    def __call__(self, rows: Rows, known: Mapping[str, Array]) -> Array:
        """Expected improvement of each row, given its known numbers; -1 outside the limits, so that it is last."""
        if not len(rows):
            return np.zeros(0)
        means, deviations = self._conditional.predict(self.model.inputs(rows, known))
        logs = _logs(known, self.objectives, len(rows))
        pairs = zip(self._regions, means, strict=True)
        total: Array = np.sum([region.expected_improvement(logs, mean, deviations) for region, mean in pairs], axis=0)
        return np.where(self._within(known, len(rows)), total / DRAWS, -1.0)

    def _within(self, known: Mapping[str, Array], count: int) -> Array:
        within = np.ones(count, bool)
        for name, limit in self.limits.items():
            within &= known[name] <= limit
        return within


def _logs(known: Mapping[str, Array], names: Sequence[str] | Mapping[str, Array], count: int) -> Array:
    """Logarithms of numbers, of shape (points, names)."""
    logs: Array = np.log(np.array([known[name] for name in names], dtype=float)).reshape(len(names), count).T
    return logs
