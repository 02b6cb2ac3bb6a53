"""Predictions of a whole run's quality from that at a rung.

The candidates that were trained to the end tell, for each rung, a line from the first seed's quality there to that of
the whole run, and how far candidates are off it. A paused candidate counts as one whose quality is known so well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from archsearch.score import QUALITY_METRICS, Quality
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
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


class RungModels:
    """The models of a study's rungs, fitted to its candidates.

    Args:
        candidates: the study's candidates, each with its rungs and with the score of all its seeds so far.
    """

    def __init__(self, settings: StudyConfig, candidates: Sequence[Candidate]) -> None:
        self._models: dict[int, RungModel] = {}
        if settings.rungs is None:
            return
        (self._metric,) = settings.quality_objectives
        for step in settings.rungs.steps:
            at_rung = {c.number: value for c in candidates if (value := self._at(c, step)) is not None}
            ends = {c.number: value for c in candidates if (value := self._at_end(c)) is not None}
            pairs = [(value, ends[number]) for number, value in at_rung.items() if number in ends]
            if (model := RungModel.fit(pairs, [*at_rung.values()])) is not None:
                self._models[step] = model

    def __getitem__(self, step: int) -> RungModel | None:
        """The model of the rung at a step; None while it cannot be fitted."""
        return self._models.get(step)

    def predict(self, c: Candidate, *, noise: float) -> tuple[Candidate, float] | None:
        """A paused candidate with the quality that its last rung predicts; None if the rung cannot be trusted.

        Args:
            noise: standard deviation of one run, relative to the quality.

        Returns:
            The candidate, and how many whole runs would tell as much of it: less than one.
        """
        rung = c.rungs[-1]
        model = self._models.get(rung.step)
        if model is None or model.correlation < TRUSTED:
            return None
        mean, deviation = model.predict(_value(rung.quality, self._metric))
        run = noise * abs(mean)  # the run that goes on is itself one draw of the candidate's runs
        estimate = Estimate(value=mean, low=mean - 2 * deviation, high=mean + 2 * deviation, by_seed=(mean,))
        predicted = c.with_score(quality=rung.quality.model_copy(update={self._metric: estimate}))
        return predicted, run**2 / (run**2 + deviation**2) if run else 1.0

    def _at(self, c: Candidate, step: int) -> float | None:
        return next((_value(r.quality, self._metric) for r in c.rungs if r.step == step), None)

    def _at_end(self, c: Candidate) -> float | None:
        quality = c.score.quality
        if c.state != "scored" or quality is None or quality.diverged:
            return None
        estimate: Estimate = getattr(quality, self._metric)
        return estimate.by_seed[0] if estimate.by_seed else estimate.value


def _value(quality: Quality, metric: str) -> float:
    assert metric in QUALITY_METRICS
    estimate: Estimate = getattr(quality, metric)
    return estimate.value
