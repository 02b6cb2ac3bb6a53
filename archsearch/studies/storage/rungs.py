"""Predictions of a whole run's quality from that at a rung.

The candidates that were trained to the end tell, for each rung, a line from the first seed's quality there to that of
the whole run, and how far candidates are off it. A paused candidate counts as one whose quality is known so well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from archsearch.score import QUALITY_METRICS, Quality
from archsearch.stats.estimate import Estimate
from archsearch.studies.storage.record import Candidate

TRUSTED = 0.9
"""Correlation of a rung with the whole run from which the rung may decide: below, what is
thrown away costs more than what is saved."""

FEWEST = 8
"""Candidates that were trained to the end, below which nothing is fitted."""


@dataclass(frozen=True)
class RungModel:
    """Line from the quality at a rung to that of the whole run."""

    slope: float
    intercept: float
    deviation: float
    """Standard deviation of the whole runs around the line."""
    center: float
    spread: float
    """Sum of squared distances of the fitted candidates from their center."""
    count: int
    correlation: float
    """Correlation over all candidates that reached the rung, not only over those that went on from it."""

    @classmethod
    def fit(cls, pairs: Sequence[tuple[float, float]], reached: Sequence[float]) -> Self | None:
        """The least-squares line; None while there are too few candidates, or they are all alike.

        Args:
            pairs: quality at the rung and after the whole run, of the candidates that were trained to the end.
            reached: quality at the rung of all candidates, also of those that went no further. Those that went on are
                the better ones, so that among them the correlation is too small.
        """
        if len(pairs) < FEWEST:
            return None
        x, y = np.array(pairs).T
        center, spread = float(x.mean()), float(np.square(x - x.mean()).sum())
        if spread == 0:
            return None
        slope = float(((x - center) * y).sum() / spread)
        intercept = float(y.mean() - slope * center)
        variance = float(np.square(y - intercept - slope * x).sum() / (len(x) - 2))
        explained = slope**2 * float(np.var(reached, ddof=1))
        total = explained + variance
        correlation = float(np.sign(slope) * (explained / total) ** 0.5) if total > 0 else 0.0
        return cls(slope, intercept, variance**0.5, center, spread, len(x), correlation)

    def predict(self, value: float) -> tuple[float, float]:
        """Mean and standard deviation of the whole run's quality, given that at the rung."""
        uncertain = 1 + 1 / self.count + (value - self.center) ** 2 / self.spread
        return self.intercept + self.slope * value, self.deviation * float(uncertain) ** 0.5


class Prediction(NamedTuple):
    """Quality of a paused candidate after its whole run, and how many whole runs would tell as much of it."""

    value: float
    runs: float


class Run(NamedTuple):
    """Quality of a candidate's first run at its rungs and at its end; None: it has not ended, or diverged.

    Attributes:
        runs: number of runs that the candidate had, one per seed.
    """

    runs: int
    rungs: tuple[tuple[int, float], ...]
    end: float | None

    @classmethod
    def of(cls, c: Candidate, metric: str) -> Self:
        """The first run of a candidate whose score is that of all its seeds so far."""
        rungs = tuple((rung.step, _estimate(rung.quality, metric).value) for rung in c.rungs)
        quality = c.score.quality
        if c.state != "scored" or quality is None or quality.diverged:
            return cls(c.runs, rungs, None)
        estimate = _estimate(quality, metric)
        return cls(c.runs, rungs, estimate.by_seed[0] if estimate.by_seed else estimate.value)


class RungModels:
    """The models of a study's rungs, fitted to its candidates' runs."""

    def __init__(self, steps: Sequence[int], runs: Sequence[Run]) -> None:
        self._models: dict[int, RungModel] = {}
        for step in steps:
            reached = [(value, run.end) for run in runs for at, value in run.rungs if at == step]
            pairs = [(value, end) for value, end in reached if end is not None]
            if (model := RungModel.fit(pairs, [value for value, _ in reached])) is not None:
                self._models[step] = model

    def __getitem__(self, step: int) -> RungModel | None:
        """The model of the rung at a step; None while it cannot be fitted."""
        return self._models.get(step)

    def predict(self, run: Run, *, noise: float) -> Prediction | None:
        """Prediction for a paused run from its last rung; None if the rung cannot be trusted.

        Args:
            noise: standard deviation of one run, relative to the quality.
        """
        step, value = run.rungs[-1]
        model = self._models.get(step)
        if model is None or model.correlation < TRUSTED:
            return None
        mean, deviation = model.predict(value)
        one = noise * abs(mean)  # the run that goes on is itself one draw of the candidate's runs
        return Prediction(mean, one**2 / (one**2 + deviation**2) if one else 1.0)


def _estimate(quality: Quality, metric: str) -> Estimate:
    assert metric in QUALITY_METRICS
    estimate: Estimate = getattr(quality, metric)
    return estimate
