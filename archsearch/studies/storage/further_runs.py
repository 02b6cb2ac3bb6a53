"""Candidates that are trained further, beyond a rung or with further seeds: which, and when.

A trial of a new candidate trains it with the first seeds only, and up to the first rung if the study has any. A trial
that *continues* another one takes its training on to the next rung or to the end; or it trains the same architecture
with the next seed, and its score is that of all seeds so far. `record.fold` adds them up. Whether a candidate is
continued is one question throughout: how likely it is to be on the front.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from archsearch.samplers.surrogate import RUN_NOISE
from archsearch.score import QUALITY_METRICS
from archsearch.stats.intervals import additive_fit
from archsearch.stats.pareto import non_dominated
from archsearch.stats.regression import Array
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.rounds import FINAL
from archsearch.studies.storage.rungs import RungModels
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.seeding import derive_seed

PRIOR_FREEDOM = 4
"""Degrees of freedom that the noise assumed at first (`RUN_NOISE`) counts for; measured ones are added.

Too much noise costs a search less than too little (benchmarks/samplers.py).
"""

LIKELY = 0.1
"""Probability of being on the front from which a candidate goes on from a rung, or gets a further seed."""

SHARE = 5
"""While candidates are still proposed, one of this many has more than the first seeds."""

DRAWS = 256
"""Draws of all candidates' true values from which that probability is estimated."""

SURE = 4
"""Number of standard deviations by which a candidate is surely worse."""


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Scored and feasible candidates, each architecture once: the final round if it has one, else the first trial."""
    seen: set[str] = set()
    unique = []
    for c in sorted(candidates, key=lambda c: (c.reused_from is not None, c.name != FINAL, c.slot)):
        if c.state == "scored" and c.id not in seen and not c.infeasible:
            seen.add(c.id)
            unique.append(c)
    return sorted(unique, key=lambda c: c.slot)


def run_noise(candidates: Iterable[Candidate], metric: str, *, prior: float = RUN_NOISE) -> float:
    """Standard deviation of a metric between runs of a candidate, relative to its value.

    It is the interaction of seed and candidate (`archsearch.stats.intervals`), pooled over the candidates of several
    seeds and shrunk towards ``prior``.
    """
    estimates = [getattr(c.score.quality, metric) for c in candidates if c.score.quality]
    several = [np.array(e.by_seed) / e.value for e in estimates if e and len(e.by_seed) > 1 and e.value > 0]
    fitted = additive_fit([tuple(values) for values in several])
    if fitted is None:
        return prior
    total = PRIOR_FREEDOM * prior**2 + fitted.freedom * fitted.variance
    return float((total / (PRIOR_FREEDOM + fitted.freedom)) ** 0.5)


def seed_offsets(candidates: Iterable[Candidate], metric: str) -> tuple[float, ...]:
    """By how much the mean of a metric over the first one, two, … seeds is too large, because of these seeds.

    Candidates of different numbers of seeds are compared without it. Empty while no two candidates have several.
    """
    estimates = [getattr(c.score.quality, metric) for c in candidates if c.score.quality]
    fitted = additive_fit([e.by_seed for e in estimates if e])
    return fitted.offsets if fitted else ()


def front_probabilities(
    candidates: Sequence[Candidate],
    names: Sequence[str],
    *,
    seed: int,
    runs: Sequence[float] | None = None,
) -> dict[int, float]:
    """Probability that no other candidate dominates each, by trial number, given the noise of the quality metrics.

    Candidates that are surely dominated are left out.

    Args:
        candidates: scored candidates, each architecture once.
        names: the objectives.
        runs: how many runs tell as much of each; None: as many as it had.
    """
    if not candidates:
        return {}
    values = np.array([[c.value(name) for name in names] for c in candidates])
    weights = np.array([max(1, c.runs) for c in candidates]) if runs is None else np.array(runs)
    noise = [run_noise(candidates, name) if name in QUALITY_METRICS else 0.0 for name in names]
    for column, name in enumerate(names):
        if name in QUALITY_METRICS and (offsets := seed_offsets(candidates, name)):
            values[:, column] -= np.array(offsets)[[max(1, c.runs) - 1 for c in candidates]]
    deviations = np.abs(values) * noise / np.sqrt(weights)[:, None]  # (candidates, objectives)
    worst = values + SURE * deviations
    front = worst[non_dominated([tuple(row) for row in worst])]
    best = values - SURE * deviations
    is_open = ~(np.all(front[:, None] <= best, axis=2) & np.any(front[:, None] < best, axis=2)).any(axis=0)
    kept = np.flatnonzero(is_open)
    rng = np.random.default_rng(seed)
    shares = _shares_on_front(values[kept], deviations[kept], rng)
    return {candidates[i].number: float(share) for i, share in zip(kept.tolist(), shares, strict=True)}


def _shares_on_front(values: Array, deviations: Array, rng: np.random.Generator) -> Array:
    """Share of `DRAWS` draws in which no other point dominates each; (points, objectives) → (points,)."""
    drawn = values + deviations * rng.standard_normal((DRAWS, *values.shape))
    exact = np.flatnonzero((deviations == 0).all(axis=0))
    if len(exact) == 1 and values.shape[1] == 2:
        # A point is on the front where it is the lowest of all that are not above it in the exact objective.
        column = values[:, exact[0]]
        order = np.argsort(column, kind="stable")
        lowest = np.minimum.accumulate(drawn[:, order, 1 - exact[0]], axis=1)
        last = np.searchsorted(column[order], column, side="right") - 1  # of those with an equal exact value
        return np.asarray((drawn[:, :, 1 - exact[0]] <= lowest[:, last]).mean(axis=0))
    counts = np.zeros(len(values))
    for points in drawn:
        counts[non_dominated([tuple(row) for row in points])] += 1
    return counts / DRAWS


def chances(settings: StudyConfig, candidates: Sequence[Candidate]) -> dict[int, float]:
    """Probability of being on the front of each scored or paused candidate, by trial number.

    Paused candidates whose rung does not tell are left out; candidates that diverged and repeated ones, too.
    """
    scored = [c for c in eligible(candidates) if not (c.score.quality and c.score.quality.diverged)]
    paused = [c for c in candidates if c.state == "paused"]
    runs: list[float] = [max(1, c.runs) for c in scored]
    predicted: list[Candidate] = []
    if paused:
        models = RungModels(settings, candidates)
        noise = run_noise(candidates, settings.quality_objectives[0])
        found = [pair for c in paused if (pair := models.predict(c, noise=noise)) is not None]
        predicted, equivalents = [c for c, _ in found], [equivalent for _, equivalent in found]
        runs += equivalents
    seed = derive_seed(settings.seed, "front")
    ranked = [*scored, *predicted]
    probability = front_probabilities(ranked, settings.objectives, seed=seed, runs=runs)
    return {c.number: probability.get(c.number, 0.0) for c in ranked}


class OpenRuns(NamedTuple):
    """Candidates that may be trained further, each with the probability that it is on the front.

    Attributes:
        scored: the scored candidates, each architecture once.
        seeds: those of them that may get a further seed.
        paused: paused candidates that go on, with 1 where the rung does not tell.
    """

    scored: list[Candidate]
    seeds: list[tuple[Candidate, float]]
    paused: list[tuple[Candidate, float]]


class FurtherRuns:
    """Decides which candidate of a study is trained further, from its trials alone."""

    def __init__(self, settings: StudyConfig) -> None:
        self._settings, self._seeds = settings, settings.seeds
        self._used = settings.seeds is not None or settings.rungs is not None
        self._known: tuple[object, OpenRuns] | None = None

    def next(self, trials: StudyTrials, *, proposing: bool) -> int | None:
        """Number of the trial to continue now; None: none.

        A paused candidate that may be on the front goes on before anything else. While new candidates are still
        proposed, a further seed goes to the likeliest of the front only until one candidate in `SHARE` has several, so
        that the noise becomes known. At the end, all that are likely to be on the front get theirs, those with the
        fewest first.

        Args:
            trials: the study's trials.
            proposing: whether another candidate may be proposed instead.
        """
        if not self._used:
            return None
        scored, seeds, paused = self._open(trials)
        if paused:
            return min(paused, key=lambda pair: (-pair[1], pair[0].slot))[0].number
        if proposing and seeds:
            assert self._seeds is not None
            first = self._seeds.first
            running = sum(t.continues is not None for t in trials.running.values())
            several = sum(c.runs > first for c in scored)
            if (several + running + 1) * SHARE > len(scored):
                return None
            seeds = [(c, p) for c, p in seeds if c.runs == first]
        # Not the number: a study that was interrupted has other numbers than the unbroken one.
        return min(seeds, key=lambda pair: (pair[0].runs, -pair[1], pair[0].slot))[0].number if seeds else None

    def count(self, trials: StudyTrials) -> int:
        """Number of further runs that the study wants before it ends, as far as is known now."""
        if not self._used:
            return 0
        _, seeds, paused = self._open(trials)
        front = self._seeds.front if self._seeds else 1
        return sum(front - c.runs for c, _ in seeds) + len(paused)

    def _open(self, trials: StudyTrials) -> OpenRuns:
        key = len(trials), len(trials.ended), len(trials.running)
        if self._known is None or self._known[0] != key:
            self._known = key, self._find_open(trials)
        return self._known[1]

    def _find_open(self, trials: StudyTrials) -> OpenRuns:
        candidates = trials.candidates()
        unfinished = [attempts[0] for slot, attempts in trials.by_slot.items() if not _has_ended(trials, slot)]
        busy = {t.continues for t in unfinished if not t.lost}  # running, or given up
        probability = chances(self._settings, candidates)
        scored = [c for c in candidates if c.state == "scored" and c.number in probability]
        front = self._seeds.front if self._seeds else 0
        seeds = [c for c in scored if c.runs < front and c.number not in busy]
        paused = [c for c in candidates if c.state == "paused" and c.number not in busy]
        return OpenRuns(
            scored,
            [(c, p) for c in seeds if (p := probability.get(c.number, 0.0)) > LIKELY],
            [(c, p) for c in paused if (p := probability.get(c.number, 1.0)) > LIKELY],
        )


def _has_ended(trials: StudyTrials, slot: int) -> bool:
    return slot in trials.active and trials.active[slot].state in ("scored", "paused")
