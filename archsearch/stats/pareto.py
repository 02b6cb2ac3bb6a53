"""Hypervolume: how much of the objectives' space a set of candidates dominates, all objectives minimised."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]

MARGIN = 0.1
"""How far the reference point lies beyond the worst value, as a share of the range, so that the ends count too."""


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume between the points and the reference that at least one point dominates.

    Slices along the last objective (Zitzler 1999): exact in any number of objectives, quick for two to four and tens
    of points.
    """
    inside = [p for p in points if all(a < b for a, b in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    ends = [*(p[-1] for p in inside[1:]), reference[-1]]
    volume = 0.0
    for i, (point, end) in enumerate(zip(inside, ends, strict=True)):
        if end > point[-1]:
            slab = front([p[:-1] for p in inside[: i + 1]])
            volume += (end - point[-1]) * hypervolume(slab, reference[:-1])
    return volume


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates, without repeats."""
    unique = sorted(set(points))
    return [p for p in unique if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in unique)]


def box(points: Sequence[Point]) -> tuple[Point, Point]:
    """The best value of each objective, and the reference: the worst of each and a tenth of the range beyond."""
    best = tuple(min(column) for column in zip(*points, strict=True))
    worst = tuple(max(column) for column in zip(*points, strict=True))
    return best, tuple(w + MARGIN * (w - b or abs(w) or 1.0) for b, w in zip(best, worst, strict=True))


def shares(points: Sequence[Point]) -> list[float]:
    """After each point: the dominated share of the box between the best values and the reference."""
    if not points:
        return []
    best, reference = box(points)
    whole = 1.0
    for low, high in zip(best, reference, strict=True):
        whole *= high - low
    kept: list[Point] = []
    found = []
    for point in points:
        kept = front([*kept, point])
        found.append(hypervolume(kept, reference) / whole)
    return found
