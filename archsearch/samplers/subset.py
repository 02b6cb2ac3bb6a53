"""Choice of the trials to model where there are more than a model can take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from archsearch.samplers.grid import Rows
from archsearch.stats.regression import Array

Indices = NDArray[np.int64]


def front_and_spread(values: Array, rows: Rows, count: int) -> Indices:
    """Indices of the trials nearest to the front, for one half of a count, and of a spread of the rest, for the other.

    The choice depends on the set of trials alone if they are sorted.

    Args:
        values: objectives of the trials, of shape (trials, objectives); all are minimized.
        rows: their points.
    """
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in values.T], axis=1)
    front = _front(ranks)
    if len(front) > count // 2:
        front = front[np.argsort(ranks[front, 0], kind="stable")]
        front = front[np.linspace(0, len(front) - 1, count // 2).astype(int)]
    # By how many ranks a trial would have to gain in every objective to be dominated by none of the front.
    behind = (ranks[:, None] - ranks[None, front]).min(axis=2).max(axis=1)
    behind[front] = -1
    near = np.argsort(behind, kind="stable")[: count // 2]
    return np.concatenate([near, _spread(rows, near, count - len(near))])


def _front(ranks: Indices) -> Indices:
    """Indices of the trials that no other one dominates; the first of equal ones."""
    left = np.lexsort((np.arange(len(ranks)), ranks.sum(axis=1)))  # whatever dominates a trial comes before it
    front = []
    while len(left):
        front.append(left[0])
        left = left[(ranks[left] < ranks[left[0]]).any(axis=1)]
    return np.array(front)


def _spread(rows: Rows, chosen: Indices, count: int) -> Indices:
    """Indices of further rows, each the one that differs most from all that are chosen before it."""
    columns = np.ascontiguousarray(rows.T.astype(np.int16))
    distances = np.full(len(rows), len(columns) + 1)

    def add(i: int) -> int:
        np.minimum(distances, np.count_nonzero(columns != columns[:, i, None], axis=0), out=distances)
        return i

    for i in chosen:
        add(i)
    return np.array([add(int(np.argmax(distances))) for _ in range(count)], dtype=int)
