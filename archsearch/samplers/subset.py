"""Choice of the trials to model where there are more than a model can take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from archsearch.stats.regression import Array

Indices = NDArray[np.int64]


def front_and_spread(values: Array, count: int) -> Indices:
    """Indices of the trials nearest to the front, for one half of a count, and of a spread of the rest, for the other.

    Args:
        values: objectives of the trials, of shape (trials, objectives); all are minimized. The rest is taken at equal
            steps, so the choice depends on the set of trials alone if these are sorted.
    """
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in values.T], axis=1)
    front = _front(ranks)
    if len(front) > count // 2:
        front = front[np.argsort(ranks[front, 0], kind="stable")]
        front = _evenly(front, count // 2)
    # By how many ranks a trial would have to gain in every objective to be dominated by none of the front.
    behind = (ranks[:, None] - ranks[None, front]).min(axis=2).max(axis=1).clip(0)
    behind[front] = -1
    order = np.argsort(behind, kind="stable")
    near = order[: count // 2]
    return np.concatenate([near, _evenly(np.sort(order[count // 2 :]), count - len(near))])


def _front(ranks: Indices) -> Indices:
    """Indices of the trials that no other one dominates; the first of equal ones."""
    left = np.argsort(ranks.sum(axis=1), kind="stable")  # whatever dominates a trial comes before it
    front = []
    while len(left):
        front.append(left[0])
        left = left[(ranks[left] < ranks[left[0]]).any(axis=1)]
    return np.array(front)


def _evenly(indices: Indices, count: int) -> Indices:
    chosen: Indices = indices[np.linspace(0, len(indices) - 1, count).astype(int)]
    return chosen
