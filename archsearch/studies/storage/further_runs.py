"""Candidates that are trained with further seeds: which, when, and what their trials add up to.

A trial of a new candidate trains it with the first seeds only. A trial that *continues* another one trains the same
architecture with the next seed, and its score is that of all seeds so far. `fold` gives each candidate its last score.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from archsearch.samplers.surrogate import RUN_NOISE
from archsearch.score import QUALITY_METRICS
from archsearch.stats.intervals import additive_fit
from archsearch.stats.pareto import non_dominated
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.rounds import FINAL
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.seeding import derive_seed

PRIOR_FREEDOM = 4
"""Degrees of freedom that the noise assumed at first (`RUN_NOISE`) counts for; measured ones are added.

Too much noise costs a search less than too little (benchmarks/samplers.py).
"""

LIKELY = 0.1
"""Probability of being on the front from which a candidate gets a further seed."""

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
        if c.state == "scored" and not c.infeasible and c.architecture.id not in seen:
            seen.add(c.architecture.id)
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


def front_probabilities(candidates: Sequence[Candidate], names: Sequence[str], *, seed: int) -> dict[int, float]:
    """Probability that no other candidate dominates each, by trial number, given the noise of the quality metrics.

    Candidates that are surely dominated are left out.

    Args:
        candidates: scored candidates, each architecture once.
        names: the objectives.
    """
    if not candidates:
        return {}
    values = np.array([[c.value(name) for name in names] for c in candidates])
    runs = np.array([max(1, c.runs) for c in candidates])
    noise = [run_noise(candidates, name) if name in QUALITY_METRICS else 0.0 for name in names]
    for column, name in enumerate(names):
        if name in QUALITY_METRICS and (offsets := seed_offsets(candidates, name)):
            values[:, column] -= np.array(offsets)[runs - 1]
    deviations = np.abs(values) * noise / np.sqrt(runs)[:, None]  # (candidates, objectives)
    worst = values + SURE * deviations
    front = worst[non_dominated([tuple(row) for row in worst])]
    best = values - SURE * deviations
    is_open = ~(np.all(front[:, None] <= best, axis=2) & np.any(front[:, None] < best, axis=2)).any(axis=0)
    kept = np.flatnonzero(is_open)
    rng = np.random.default_rng(seed)
    drawn = values[kept] + deviations[kept] * rng.standard_normal((DRAWS, len(kept), len(names)))
    counts = np.zeros(len(kept))
    for points in drawn:
        counts[non_dominated([tuple(row) for row in points])] += 1
    return {candidates[i].number: float(count) / DRAWS for i, count in zip(kept.tolist(), counts, strict=True)}


class FurtherRuns:
    """Decides which candidate of a study gets a further seed, from its trials alone."""

    def __init__(self, settings: StudyConfig) -> None:
        self._settings, self._seeds = settings, settings.seeds
        self._known: tuple[object, tuple[list[Candidate], list[tuple[Candidate, float]]]] | None = None

    def next(self, trials: StudyTrials, *, proposing: bool) -> int | None:
        """Number of the trial to continue now; None: none.

        While new candidates are still proposed, a further seed goes to the likeliest of the front only until one
        candidate in `SHARE` has several, so that the noise becomes known. At the end, all that are likely to be on the
        front get theirs, those with the fewest first.

        Args:
            trials: the study's trials.
            proposing: whether another candidate may be proposed instead.
        """
        if self._seeds is None:
            return None
        scored, open_ = self._open(trials)
        if proposing:
            running = sum(t.continues is not None for t in trials.running.values())
            several = sum(c.runs > self._seeds.first for c in scored)
            if (several + running + 1) * SHARE > len(scored):
                return None
            open_ = [(c, p) for c, p in open_ if c.runs == self._seeds.first]
        # Not the number: a study that was interrupted has other numbers than the unbroken one.
        return min(open_, key=lambda pair: (pair[0].runs, -pair[1], pair[0].slot))[0].number if open_ else None

    def count(self, trials: StudyTrials) -> int:
        """Number of further runs that the study wants before it ends, as far as is known now."""
        if self._seeds is None:
            return 0
        return sum(self._seeds.front - c.runs for c, _ in self._open(trials)[1])

    def _open(self, trials: StudyTrials) -> tuple[list[Candidate], list[tuple[Candidate, float]]]:
        """The scored candidates, and those of them that may get a further seed, each with its probability."""
        key = len(trials), len(trials.ended), len(trials.running)
        if self._known is None or self._known[0] != key:
            self._known = key, self._find_open(trials)
        return self._known[1]

    def _find_open(self, trials: StudyTrials) -> tuple[list[Candidate], list[tuple[Candidate, float]]]:
        assert self._seeds is not None
        scored = [c for c in eligible(trials.candidates()) if not (c.score.quality and c.score.quality.diverged)]
        unfinished = [attempts[0] for slot, attempts in trials.by_slot.items() if not _is_scored(trials, slot)]
        busy = {t.continues for t in unfinished if not t.lost}  # running, or given up
        seed = derive_seed(self._settings.seed, "front")
        probability = front_probabilities(scored, self._settings.objectives, seed=seed)
        may = [c for c in scored if c.runs < self._seeds.front and c.number not in busy]
        return scored, [(c, p) for c in may if (p := probability.get(c.number, 0.0)) > LIKELY]


def _is_scored(trials: StudyTrials, slot: int) -> bool:
    return slot in trials.active and trials.active[slot].state == "scored"
