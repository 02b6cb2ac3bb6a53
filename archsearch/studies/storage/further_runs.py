"""Candidates that are trained further, beyond a rung or with further seeds: which, and when.

A trial of a new candidate trains it with the first seeds only, and up to the first rung if the study has any. A trial
that *continues* another one takes its training on to the next rung or to the end; or it trains the same architecture
with the next seed, and its score is that of all seeds so far. `record.fold` adds them up. Whether a candidate is
continued is one question throughout: how likely it is to be on the front.
"""

from __future__ import annotations

from typing import NamedTuple

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.ranking import Ranking
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.study_trials import StudyTrials

LIKELY = 0.1
"""Probability of being on the front from which a candidate goes on from a rung, or gets a further seed."""

SHARE = 5
"""While candidates are still proposed, one of this many has more than the first seeds."""


class OpenRuns(NamedTuple):
    """Candidates that may be trained further, each with the probability that it is on the front.

    Attributes:
        seeds: scored candidates that may get a further seed.
        paused: paused candidates that go on, with 1 where the rung does not tell.
    """

    seeds: list[tuple[Candidate, float]]
    paused: list[tuple[Candidate, float]]


class FurtherRuns:
    """Decides which candidate of a study is trained further, from its trials alone."""

    def __init__(self, settings: StudyConfig) -> None:
        self._settings, self._seeds = settings, settings.seeds
        self._used = settings.seeds is not None or settings.rungs is not None
        self._known: tuple[Ranking, OpenRuns] | None = None

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
        ranking, seeds = trials.ranking(self._settings), self._seeds
        running = sum(t.continues is not None for t in trials.running.values())
        has_shared = proposing and (seeds is None or (ranking.several + running + 1) * SHARE > len(ranking.scored))
        if has_shared and not ranking.paused:
            return None  # before the probabilities are estimated
        open_seeds, paused = self._open(trials)
        if paused:
            return min(paused, key=lambda pair: (-pair[1], pair[0].slot))[0].number
        if has_shared:
            return None
        if proposing and seeds:
            open_seeds = [(c, p) for c, p in open_seeds if c.runs == seeds.first]
        # Not the number: a study that was interrupted has other numbers than the unbroken one.
        open_seeds.sort(key=lambda pair: (pair[0].runs, -pair[1], pair[0].slot))
        return open_seeds[0][0].number if open_seeds else None

    def count(self, trials: StudyTrials) -> int:
        """Number of further runs that the study wants before it ends, as far as is known now."""
        if not self._used:
            return 0
        seeds, paused = self._open(trials)
        front = self._seeds.front if self._seeds else 1
        return sum(front - c.runs for c, _ in seeds) + len(paused)

    def _open(self, trials: StudyTrials) -> OpenRuns:
        ranking = trials.ranking(self._settings)
        if self._known is not None and self._known[0] is ranking:
            return self._known[1]
        busy = trials.continued()
        front = self._seeds.front if self._seeds else 0
        likely = [(c, p) for c, p in ranking.likely(LIKELY) if c.number not in busy]
        unknown = [(c, 1.0) for c in ranking.paused if c.number not in ranking.predictions and c.number not in busy]
        found = OpenRuns(
            [(c, p) for c, p in likely if c.state == "scored" and c.runs < front],
            [*((c, p) for c, p in likely if c.state == "paused"), *unknown],
        )
        self._known = ranking, found
        return found
