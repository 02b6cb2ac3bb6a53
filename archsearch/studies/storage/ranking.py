"""The candidates of a study as they stand: which compete, how noisy a run is, and how likely each is on the front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from archsearch.samplers.surrogate import RUN_NOISE
from archsearch.stats.intervals import additive_fit
from archsearch.stats.pareto import non_dominated
from archsearch.stats.regression import Array
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.rounds import FINAL
from archsearch.studies.storage.rungs import Prediction, Run, RungModels
from snapgen.seeding import derive_seed

PRIOR_FREEDOM = 4
"""Degrees of freedom that the noise assumed at first (`RUN_NOISE`) counts for; measured ones are added.

Too much noise costs a search less than too little.
"""

DRAWS = 256
"""Draws of all candidates' true values from which the probability of being on the front is estimated."""

DRAWN = 2**18
"""Number of values that are drawn at most: of more than a thousand candidates there are fewer draws than `DRAWS`."""

FEWEST_DRAWS = 64
"""Number of draws at least."""

SURE = 3
"""Number of standard deviations of their difference by which a candidate is surely worse than another one."""


Precedence = tuple[bool, bool, int]


class Row(NamedTuple):
    """A candidate with what is needed of it at every ranking."""

    candidate: Candidate
    architecture_id: str
    slot: int
    is_paused: bool
    precedence: Precedence
    """Of one architecture's candidates the lowest counts: the final round if there is one, else the first trial."""
    competes: bool
    """Whether it is scored and feasible."""
    diverged: bool
    values: tuple[float, ...]
    """The study's objectives, NaN where the score lacks one."""
    by_seed: tuple[tuple[float, ...], ...]
    """Values of each quality objective by seed."""
    run: Run
    """The first seed's quality at the rungs and at the end, in a study with rungs."""


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Scored and feasible candidates, each architecture once: the final round if it has one, else the first trial."""
    last_to_first = sorted(filter(competes, candidates), key=_precedence, reverse=True)
    return sorted({c.id: c for c in last_to_first}.values(), key=attrgetter("slot"))


def competes(c: Candidate) -> bool:
    """Whether a candidate is scored and feasible."""
    return c.state == "scored" and not c.infeasible


def run_noise(by_seed: Iterable[tuple[float, ...]], *, prior: float = RUN_NOISE) -> float:
    """Standard deviation of a metric between runs of a candidate, relative to its value.

    It is the interaction of seed and candidate (`archsearch.stats.intervals`), pooled over the candidates of several
    seeds and shrunk towards ``prior``.

    Args:
        by_seed: values of each candidate.
    """
    means = ((values, sum(values) / len(values)) for values in by_seed if len(values) > 1)
    fitted = additive_fit([tuple(value / mean for value in values) for values, mean in means if mean > 0])
    if fitted is None:
        return prior
    total = PRIOR_FREEDOM * prior**2 + fitted.freedom * fitted.variance
    return float((total / (PRIOR_FREEDOM + fitted.freedom)) ** 0.5)


def seed_offsets(by_seed: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """By how much the mean of a metric over the first one, two, … seeds is too large, because of these seeds.

    Candidates of different numbers of seeds are compared without it. Empty while no two candidates have several.
    """
    fitted = additive_fit([values for values in by_seed if len(values) > 1])
    return fitted.offsets if fitted else ()


def front_probabilities(values: Array, deviations: Array, *, seed: int) -> Array:
    """Probability that no other point dominates each, given the standard deviations of their values.

    Shapes: values and deviations (points, objectives); returns (points,).
    """
    rng = np.random.default_rng(seed)
    exact = np.flatnonzero((deviations == 0).all(axis=0))
    if len(exact) == 1 and values.shape[1] == 2:
        noisy = 1 - exact[0]
        return _lowest_probabilities(values[:, exact[0]], values[:, noisy], deviations[:, noisy], rng)
    counts, draws = np.zeros(len(values)), _draws(values.size)
    for points in values + deviations * rng.standard_normal((draws, *values.shape)):
        counts[non_dominated(points.tolist())] += 1
    return counts / draws


def _lowest_probabilities(exact: Array, values: Array, deviations: Array, rng: np.random.Generator) -> Array:
    """Probability that a point has the lowest value of all that are not above it in the exact objective.

    That of points that are surely above one of those is 0. All shapes are (points,).
    """
    order = np.argsort(exact, kind="stable")
    values, deviations = values[order], deviations[order]
    last = np.searchsorted(exact[order], exact[order], side="right") - 1  # of those with an equal exact value
    is_lowest = values == np.minimum.accumulate(values)
    lowest = np.maximum.accumulate(np.where(is_lowest, np.arange(len(values)), 0))[last]
    is_open = values - values[lowest] <= SURE * np.hypot(deviations, deviations[lowest])
    kept = np.flatnonzero(is_open)
    drawn = values[kept] + deviations[kept] * rng.standard_normal((_draws(len(kept)), len(kept)))
    before = np.cumsum(is_open)[last[kept]] - 1  # index of the last of those among the kept
    found = np.zeros(len(values))
    found[order[kept]] = (drawn <= np.minimum.accumulate(drawn, axis=1)[:, before]).mean(axis=0)
    return found


def _draws(size: int) -> int:
    return max(FEWEST_DRAWS, min(DRAWS, DRAWN // max(1, size)))


class Ranking:
    """The candidates of a study as they stand under its settings.

    Args:
        candidates: the candidates by slot, each with its rungs and with the score of all its seeds so far.
        known: rows of the last ranking, in the order of its candidates, which are kept up to date; a ranking then takes
            time for what has changed, and little for the others.

    Attributes:
        scored: the scored and feasible candidates, each architecture once, without those that diverged.
        paused: the candidates that are paused at a rung.
        several: number of scored candidates with more than the first seeds.
    """

    def __init__(
        self, settings: StudyConfig, candidates: Sequence[Candidate], *, known: list[Row] | None = None
    ) -> None:
        self._settings = settings
        self._columns = {settings.objectives.index(name): name for name in settings.quality_objectives}
        known = [] if known is None else known
        del known[len(candidates) :]
        for i, (c, row) in enumerate(zip(candidates, known, strict=False)):
            if row.candidate is not c:
                known[i] = self._row(c)
        known.extend(map(self._row, candidates[len(known) :]))
        self._rows = list(known)
        competing = sorted((row for row in self._rows if row.competes), key=attrgetter("precedence"), reverse=True)
        first = {row.architecture_id: row for row in competing}.values()  # the last of each is the lowest
        self._ranked = sorted((row for row in first if not row.diverged), key=attrgetter("slot"))
        self._paused = [row for row in self._rows if row.is_paused]
        self.scored = [row.candidate for row in self._ranked]
        self.paused = [row.candidate for row in self._paused]
        fewest = len(settings.first_seeds)
        self.several = len([row for row in self._ranked if row.run.runs > fewest])

    @cached_property
    def noise(self) -> dict[str, float]:
        """Noise of one run by quality objective, relative to its value; see `run_noise`."""
        names = self._settings.quality_objectives
        return {name: run_noise(row.by_seed[i] for row in self._ranked) for i, name in enumerate(names)}

    @cached_property
    def offsets(self) -> dict[str, tuple[float, ...]]:
        """Common effects of the seeds by quality objective; see `seed_offsets`."""
        names = self._settings.quality_objectives
        return {name: seed_offsets(row.by_seed[i] for row in self._ranked) for i, name in enumerate(names)}

    @cached_property
    def rung_models(self) -> RungModels:
        """The models of the rungs; none of a study without rungs."""
        steps = self._settings.rungs.steps if self._settings.rungs else ()
        return RungModels(steps, [row.run for row in self._rows] if steps else ())

    @cached_property
    def predictions(self) -> dict[int, Prediction]:
        """Predictions for the paused candidates from their last rung, by trial number, where it can be trusted."""
        if not self._paused:
            return {}
        noise = self.noise[self._settings.quality_objectives[0]]
        found = ((row.candidate.number, self.rung_models.predict(row.run, noise=noise)) for row in self._paused)
        return {number: prediction for number, prediction in found if prediction is not None}

    @cached_property
    def chances(self) -> dict[int, float]:
        """Probability of being on the front of each scored or paused candidate, by trial number.

        Paused candidates whose rung does not tell are left out; candidates that diverged and repeated ones, too.
        """
        rows, found = self._found
        return dict(zip((row.candidate.number for row in rows), found.tolist(), strict=True))

    def likely(self, above: float) -> list[tuple[Candidate, float]]:
        """The candidates that are on the front with more than a probability, and that probability."""
        rows, found = self._found
        return [(rows[i].candidate, float(found[i])) for i in np.flatnonzero(found > above)]

    @cached_property
    def _found(self) -> tuple[list[Row], Array]:
        """Scored and predicted candidates, and the probability of each."""
        predicted = [row for row in self._paused if row.candidate.number in self.predictions]
        rows = [*self._ranked, *predicted]
        if not rows:
            return [], np.zeros(0)
        values = np.array([row.values for row in rows])
        runs = np.array([max(1.0, row.run.runs) for row in rows])
        deviations = np.zeros_like(values)
        for i, name in self._columns.items():
            seeds = np.maximum(1, runs).astype(int)  # a prediction is of the first seed's run
            for at, row in enumerate(predicted, len(self._ranked)):
                values[at, i], runs[at] = self.predictions[row.candidate.number]
            if offsets := self.offsets[name]:
                values[:, i] -= np.array(offsets)[seeds - 1]
            deviations[:, i] = np.abs(values[:, i]) * self.noise[name] / np.sqrt(runs)
        return rows, front_probabilities(values, deviations, seed=derive_seed(self._settings.seed, "front"))

    def _row(self, c: Candidate) -> Row:
        quality, names = c.score.quality, self._settings.quality_objectives
        return Row(
            candidate=c,
            architecture_id=c.id,
            slot=c.slot,
            is_paused=c.state == "paused",
            precedence=_precedence(c),
            competes=competes(c),
            diverged=quality is not None and quality.diverged,
            values=tuple(
                math.nan if value is None else value for value in map(c.score.find, self._settings.objectives)
            ),
            by_seed=tuple(getattr(quality, name).by_seed if quality else () for name in names),
            run=Run.of(c, names[0]) if names else Run(0, (), None),
        )


def _precedence(c: Candidate) -> Precedence:
    return c.reused_from is not None, c.name != FINAL, c.slot
