"""Differences between the rows of a table, all measured with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import CONFIDENCE, half_width

Array = NDArray[np.float64]

UNEVEN = 0.1
"""Probability with which an F test calls a net uneven whose spread over the seeds is that of the others."""


def at_once(count: int) -> float:
    """Confidence of each of several intervals with which all of them hold at once (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, count)


class SeedTable:
    """Rows that were measured with the same seeds, each the evaluation of a net that was trained once per seed.

    A value is row + seed + net × seed + row × seed. What a seed does to all rows cancels in a difference. What it does
    to a net is shared by all rows of the net, so that it cancels between two rows of one net, and rows of the same net
    do not add degrees of freedom. Both interactions are pooled over all rows. A net whose spread is larger than that of
    the others (`uneven`) has intervals of its own spread where these are wider.

    Args:
        rows: the rows by name, each with the same two seeds or more.
        nets: name of each row's net; None: each row has its own.
    """

    def __init__(self, rows: Mapping[str, Estimate], nets: Mapping[str, str] | None = None) -> None:
        self.rows = dict(rows)
        (seeds,) = {len(e.by_seed) for e in rows.values()}
        assert seeds > 1, "the rows need two seeds or more"
        self._values: Array = np.array([e.by_seed for e in rows.values()])  # (R, S)
        names = [nets[name] if nets else name for name in rows]
        self._net = np.unique(names, return_inverse=True)[1]  # (R,)
        self._sizes = np.bincount(self._net)  # rows of each net, (N,)
        self._means: Array = _sums(self._values, self._net) / self._sizes[:, None]  # (N, S)

    def difference(self, name: str, baseline: str, *, confidence: float = CONFIDENCE) -> Estimate:
        """A row minus another one."""
        return self.contrast({name: 1, baseline: -1} if name != baseline else {}, confidence=confidence)

    def contrast(self, weights: Mapping[str, float], *, confidence: float = CONFIDENCE) -> Estimate:
        """A weighted sum of rows with weights that add up to 0; rows without a weight have 0."""
        assert abs(sum(weights.values())) < 1e-9, "the weights of a contrast add up to 0"
        row_weights = np.array([weights.get(name, 0.0) for name in self.rows])
        by_seed = row_weights @ self._values  # (R,) @ (R, S) -> (S,)
        half = self._half_width(row_weights, by_seed, confidence)
        value = float(by_seed.mean())
        return Estimate(value=value, low=value - half, high=value + half, by_seed=tuple(by_seed.tolist()))

    def mean(self, name: str) -> Estimate:
        """A row with the interval by which it is compared with the others: without what a seed does to all rows."""
        row = list(self.rows).index(name)
        row_weights = np.eye(len(self.rows))[row]
        others = np.delete(self._means, self._net[row], axis=0)
        relative = self._values[row] - (others.mean(0) if len(others) else 0.0)
        half = self._half_width(row_weights, relative, CONFIDENCE)
        value = float(self._values[row].mean())
        return self.rows[name].model_copy(update={"value": value, "low": value - half, "high": value + half})

    def _half_width(self, row_weights: Array, by_seed: Array, confidence: float) -> float:
        """Half width of the interval of Σ row_weights · rows, which is ``by_seed`` with each seed."""
        net_weights = np.bincount(self._net, row_weights)
        seeds = len(by_seed)
        own = half_width([(float(by_seed.var(ddof=1)) / seeds, seeds - 1)], confidence)
        involved = np.abs(net_weights) > 1e-9
        if len(self._sizes) == 1 and involved.any():
            return own
        # With σ² = net × seed and τ² = row × seed, the variance is Σ net_weights² σ² + Σ row_weights² τ², and the mean
        # square between nets estimates σ² + mean(1 / sizes) τ².
        between = float(net_weights @ net_weights)
        within = max(0.0, float(row_weights @ row_weights) - between * float((1 / self._sizes).mean()))
        (net_variance, net_freedom), (row_variance, row_freedom) = self._between, self._within
        parts = [(between * net_variance / seeds, net_freedom), (within * row_variance / seeds, row_freedom)]
        pooled = half_width(parts, confidence)
        return max(own, pooled) if (involved & self._is_uneven).any() else pooled

    @property
    def uneven(self) -> tuple[str, ...]:
        """Rows whose net has a larger spread over the seeds than the others."""
        return tuple(name for name, net in zip(self.rows, self._net, strict=True) if self._is_uneven[net])

    @cached_property
    def _is_uneven(self) -> NDArray[np.bool_]:
        """Whether an F test finds a net's spread about the others larger than theirs, (N,)."""
        nets, seeds = self._means.shape
        if nets < 3:
            return np.zeros(nets, dtype=bool)
        total, free = _interaction(self._means), ((nets - 2) * (seeds - 1))
        rest = np.array([_interaction(np.delete(self._means, net, axis=0)) for net in range(nets)])
        ratios = np.maximum(total - rest, 0) / (seeds - 1) / np.maximum(rest / free, 1e-12 * total / free + 1e-300)
        return np.asarray(fdtrc(seeds - 1, free, ratios) < UNEVEN)

    @cached_property
    def _between(self) -> tuple[float, int]:
        """Mean square of the interaction of nets and seeds, and its degrees of freedom."""
        freedom = max(1, len(self._means) - 1) * (self._means.shape[1] - 1)
        return _interaction(self._means) / freedom, freedom

    @cached_property
    def _within(self) -> tuple[float, int]:
        """Mean square of the interaction of seeds and the rows of a net, and its degrees of freedom."""
        residuals = self._values - self._means[self._net]
        residuals = residuals - residuals.mean(1, keepdims=True)
        freedom = max(1, len(self._values) - len(self._means)) * (self._means.shape[1] - 1)
        return float((residuals**2).sum()) / freedom, freedom


def _sums(values: Array, groups: NDArray[np.intp]) -> Array:
    """Sums over the rows of each group: (R, S) -> (groups, S)."""
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def _interaction(table: Array) -> float:
    """Sum of squares of the two-way interaction of rows and columns."""
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float((residuals**2).sum())
