"""Expected hypervolume improvement where all objectives but one are known before a candidate is tried."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from archsearch.stats.regression import Array


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
