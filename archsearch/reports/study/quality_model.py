"""The sampler's model of quality: how well it predicts a candidate of a study from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from archsearch.reports.rendering import formatting
from archsearch.reports.study.data import StudyData
from archsearch.score import QUALITY_METRICS
from archsearch.studies.search.known_costs import known_numbers
from archsearch.studies.storage.ranking import PRIOR_FREEDOM, run_noise

if TYPE_CHECKING:
    from archsearch.stats.regression import Array

FEWEST = 5
"""Candidates below which the model is not described."""


@dataclass(frozen=True)
class QualityModel:
    """The Gaussian process of the sampler ehvi, fitted to a study's candidates.

    Attributes:
        metric: the quality number that it predicts.
        candidates: number of candidates behind it.
        r_squared: share of the variance between candidates that it predicts, each from the others.
        features: numbers beside the knobs that it takes as inputs, because it predicts better with them.
        noise: standard deviation of the metric between runs, relative to its value.
        is_noise_measured: whether it is known from candidates of several seeds, rather than assumed.
    """

    metric: str
    candidates: int
    r_squared: float
    features: tuple[str, ...]
    noise: float
    is_noise_measured: bool

    def text(self, study: StudyData) -> str:
        """The model in one sentence."""
        inputs = "the knobs"
        if self.features:
            inputs += " and the logarithms of " + ", ".join(study.label(name) for name in self.features)
        source = "as measured" if self.is_noise_measured else "an assumption"
        return (
            f"The sampler's model predicts {study.label(self.metric)} from {inputs}: each of {self.candidates} "
            f"candidates from the others with R² = {self.r_squared:.2f} (leave-one-out). It takes the noise of one run "
            f"to be {100 * self.noise:.1f}{formatting.NBSP}%, {source}."
        )


def quality_model(study: StudyData) -> QualityModel | None:
    """The model of a study whose sampler is ehvi; None for other studies and while there are too few candidates."""
    from archsearch.samplers.acquisition import choose_model
    from archsearch.samplers.grid import Grid
    from archsearch.studies.search.samplers import distributions

    metric = next((name for name in study.objectives if name in QUALITY_METRICS), None)
    sampler = study.attrs["settings"].get("sampler", {"name": ""})
    candidates = [c for c in study.scored if c in study.trained]
    if sampler["name"] != "ehvi" or metric is None or len(candidates) < FEWEST:
        return None
    records = [c.score.latency for c in candidates]
    predicted = all(r is not None and r.source == "predicted" for r in records)
    grid = Grid(distributions(study.factors))
    noise = run_noise(getattr(c.score.quality, metric).by_seed for c in candidates)
    values: Array = np.array([c.value(metric) for c in candidates])
    variances = np.square(noise * values) / [c.runs for c in candidates]
    numbers = [known_numbers(c.score.cost, c.score.latency if predicted else None) for c in candidates]
    known = {name: np.array([of_one[name] for of_one in numbers]) for name in numbers[0]}
    rows = grid.rows([c.point for c in candidates])
    model = choose_model(grid, rows, known, values, variances, features=sampler["options"].get("features"))
    several = sum(c.runs > 1 for c in candidates)
    return QualityModel(
        metric, len(candidates), model.process.r_squared, model.inputs.features, noise, several > PRIOR_FREEDOM
    )
