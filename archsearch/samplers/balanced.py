"""Order of the points of a grid whose first parts have each choice, and each pair of choices, about equally often."""

from __future__ import annotations

import itertools

import numpy as np

from archsearch.samplers.grid import Grid, Rows
from archsearch.stats.regression import Array

PAIR_WEIGHT = 0.3
"""Deviation of an effect of two parameters together, relative to that of one alone."""


def balanced_order(grid: Grid, rows: Rows, *, first: int = 0, seed: int = 0) -> Rows:
    """Rows in an order that settles effects early: each next one is that whose value is known least from those before.

    This is the sequential D-optimal design of a linear model with all main effects and all interactions of two
    parameters (Fedorov 1972), whose effects have normal priors.

    Args:
        first: number of rows that come first, as they are.
        seed: decides between rows that are equally good.
    """
    inputs = _effects(grid, rows)
    ties = np.random.default_rng(seed).permutation(len(rows))
    left = np.ones(len(rows), dtype=bool)
    projected = inputs.copy()  # inputs times the covariance of the effects, given the rows so far
    order = []
    for place in range(len(rows)):
        variance = np.where(left, np.round(np.einsum("ij,ij->i", projected, inputs), 9), -1.0)
        chosen = place if place < first else int(np.lexsort((ties, -variance))[0])
        order.append(chosen)
        left[chosen] = False
        # A value observed with unit noise (Sherman and Morrison).
        shared = projected @ inputs[chosen]
        projected -= np.outer(shared, projected[chosen]) / (1 + shared[chosen])
    ordered: Rows = rows[order]
    return ordered


def _effects(grid: Grid, rows: Rows) -> Array:
    """Inputs of the linear model: 1, the choices of each parameter about their mean, and products of those of two."""
    main = [np.eye(int(count))[column] - 1 / count for count, column in zip(grid.counts, rows.T, strict=True)]
    pairs = [
        PAIR_WEIGHT * (a[:, :, None] * b[:, None, :]).reshape(len(rows), -1) for a, b in itertools.combinations(main, 2)
    ]
    return np.hstack([np.ones((len(rows), 1)), *main, *pairs])
