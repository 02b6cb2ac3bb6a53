"""How far searches on a table have come: hypervolume and regret by candidates and by simulated seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from archsearch.stats.pareto import Point, bounds, front, hypervolume
from archsearch.stats.regression import Array
from archsearch.studies.tabular.replay import Scored


@dataclass(frozen=True)
class Truth:
    """True values of the objectives of every architecture that meets the limits, by id.

    Quality is the mean over the table's seeds, runs that the searches are told of, too: what they cannot know is the
    noise that is left in it.
    """

    points: Mapping[str, Point]

    @cached_property
    def reference(self) -> Point:
        """Reference point of the hypervolume: the worst values, extended by a tenth of the range."""
        return bounds([*self.points.values()])[1]

    @cached_property
    def volume(self) -> float:
        """Hypervolume of the true front."""
        return hypervolume(self.front, self.reference)

    @cached_property
    def front(self) -> list[Point]:
        """The true front."""
        return front([*self.points.values()])


@dataclass(frozen=True)
class Trace:
    """Progress of one search, with a value after each score that it got.

    Attributes:
        architecture_ids: the architecture that each score is of.
        seconds: simulated time.
        candidates: number of candidates that were trained to the end.
        runs: training of the search, in whole runs.
        hypervolume: that of all candidates so far at their true values, as a share of the true front's.
        regret: true value of the first objective of the candidate with the lowest observed one, above the lowest true
            one.
    """

    architecture_ids: tuple[str, ...]
    seconds: Array
    candidates: Array
    runs: Array
    hypervolume: Array
    regret: Array

    @classmethod
    def of(cls, history: Sequence[Scored], truth: Truth) -> Trace:
        """The trace of a search's scores."""
        observed: dict[str, Scored] = {}
        best = min(point[0] for point in truth.points.values())
        points: list[Point] = []
        rows = []
        for scored in history:
            if scored.architecture_id not in observed and scored.architecture_id in truth.points:
                points = front([*points, truth.points[scored.architecture_id]])
            observed[scored.architecture_id] = scored
            known = [s for s in observed.values() if s.is_feasible and s.architecture_id in truth.points]
            chosen = min(known, key=lambda s: s.observed[0], default=None)
            regret = math.inf if chosen is None else truth.points[chosen.architecture_id][0] - best
            share = hypervolume(points, truth.reference) / truth.volume
            rows.append((scored.seconds, len(observed), scored.spent, share, regret))
        ids = tuple(scored.architecture_id for scored in history)
        return cls(ids, *np.array(rows, dtype=np.float64).reshape(-1, 5).T)

    def after_candidates(self, count: float) -> tuple[float, float]:
        """Hypervolume and regret once so many candidates were trained; of all, if there are fewer."""
        return self._at(int(np.searchsorted(self.candidates, count, side="left")))

    def after_seconds(self, seconds: float) -> tuple[float, float]:
        """Hypervolume and regret at a time."""
        return self._at(int(np.searchsorted(self.seconds, seconds, side="right")) - 1)

    def _at(self, index: int) -> tuple[float, float]:
        if index < 0 or not len(self.seconds):
            return 0.0, math.inf
        index = min(index, len(self.seconds) - 1)
        return float(self.hypervolume[index]), float(self.regret[index])

    def reaches(self, share: float) -> tuple[float, float, float]:
        """Candidates, runs and seconds until the hypervolume has a share of the true one; infinite if it never has."""
        if not len(self.hypervolume) or self.hypervolume[-1] < share:
            return math.inf, math.inf, math.inf
        index = int(np.argmax(self.hypervolume >= share))
        return float(self.candidates[index]), float(self.runs[index]), float(self.seconds[index])
