"""Pareto front and dominated hypervolume of a set of candidates; all objectives are minimized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Point = tuple[float, ...]

MARGIN = 0.1
"""Distance of the reference point from the worst value, as a fraction of the range, so that extreme points count."""


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume that is dominated by at least one point and bounded by the reference point.

    Computed by slicing along the last objective (Zitzler 1999): exact for any number of objectives, and fast for two to
    four objectives and tens of points.
    """
    dominating = [p for p in points if all(a < b for a, b in zip(p, reference, strict=True))]
    if not dominating:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in dominating)
    dominating.sort(key=lambda p: p[-1])
    ends = [*(p[-1] for p in dominating[1:]), reference[-1]]
    volume = 0.0
    for i, (point, end) in enumerate(zip(dominating, ends, strict=True)):
        if end > point[-1]:
            slab = front([p[:-1] for p in dominating[: i + 1]])
            volume += (end - point[-1]) * hypervolume(slab, reference[:-1])
    return volume


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one dominates, in ascending order of the points; the first of equal ones."""
    if points and len(points[0]) == 2:
        return _staircase(np.array(points))
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):  # only earlier points can dominate a point
        if not any(all(a <= b for a, b in zip(points[k], points[i], strict=True)) for k in kept):
            kept.append(i)
    return kept


def _staircase(points: npt.NDArray[np.float64]) -> list[int]:
    """`non_dominated` of two objectives, in the time of a sort."""
    order = np.lexsort((points[:, 1], points[:, 0]))  # stable, so that the first of equal ones comes first
    second = points[order, 1]
    lowest_before = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]])
    return [int(i) for i in order[second < lowest_before]]


def front(points: Sequence[Point]) -> list[Point]:
    """Non-dominated points, without duplicates, in ascending order."""
    return [points[i] for i in non_dominated(points)]


def bounds(points: Sequence[Point]) -> tuple[Point, Point]:
    """Best value of each objective, and reference point: the worst values, extended by `MARGIN`."""
    best = tuple(min(column) for column in zip(*points, strict=True))
    worst = tuple(max(column) for column in zip(*points, strict=True))
    return best, tuple(w + MARGIN * (w - b or abs(w) or 1.0) for b, w in zip(best, worst, strict=True))


def hypervolume_history(points: Sequence[Point]) -> list[float]:
    """Hypervolume after each point, as a fraction of the volume between the ideal point and the reference point."""
    if not points:
        return []
    best, reference = bounds(points)
    total = 1.0
    for low, high in zip(best, reference, strict=True):
        total *= high - low
    current_front: list[Point] = []
    history = []
    for point in points:
        current_front = front([*current_front, point])
        history.append(hypervolume(current_front, reference) / total)
    return history
