"""Choose the architecture of a slot: a reference, the sampler's suggestion, or a new one near that suggestion."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna import Study

from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.known_costs import KnownCosts
from archsearch.studies.search.samplers import ObservedTrial, distributions, every_point, suggest
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.storage.rungs import Prediction
from archsearch.studies.storage.study_trials import StudyTrials, is_abandoned
from snapgen.architecture.schema import Architecture
from snapgen.seeding import derive_seed

MAX_SUGGESTIONS = 2
"""Suggestions that the sampler makes for one slot before a point near its last suggestion is used instead."""

RANDOM_POINTS = 300
"""Number of random points to try when all neighbors of the suggestion are known."""

MAX_ENUMERATED = 4096
"""Spaces of at most this many points are enumerated before they are declared exhausted."""

MAX_REUSED_IN_A_ROW = 5
"""After this many consecutive trials that reused a score, known suggestions are skipped without a trial."""


class SearchSpaceExhausted(Exception):
    """There is no further architecture to propose; the message is the reason."""


@dataclass(frozen=True)
class Proposal:
    """The candidate of a slot.

    Attributes:
        name: "base" or the name of a reference, if the candidate is one.
        sampler_attrs: system attributes that the sampler needs when it is asked again.
        same_as: the scored trial of the same architecture, whose score is reused.
    """

    point: dict[str, int]
    architecture: Architecture
    name: str | None
    sampler_attrs: Mapping[str, Any]
    same_as: TrialRecord | None = None


class CandidateProposer(Protocol):
    """Interface that chooses the candidate of a slot for a worker."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """Optuna distribution of each knob."""

    def propose(self, claim: TrialRecord, trials: StudyTrials, *, attempt: int = 0) -> Proposal:
        """The candidate of a slot; see `Proposer.propose`."""


ProposerFactory = Callable[[StudyConfig, "Space", "Study"], CandidateProposer]


class Proposer:
    """The default proposer. Its proposals depend only on the trials, the slot and the settings."""

    def __init__(
        self, settings: StudyConfig, space: Space, study: Study | None = None, *, known: KnownCosts | None = None
    ) -> None:
        self._settings, self._space = settings, space
        self.choices: Mapping[str, Any] = distributions(space.knobs)
        named = space.reference_points()
        self.initial = [(_name(named, point), point) for point in settings.initial_points] or list(named.items())
        """Names (or None) and points of the first slots: the initial points, or the base and the references; then those
        of the study that this one starts from, and with the sampler grid every other architecture."""
        attrs = study.user_attrs if study is not None else {}
        given = attrs["start"] if study is not None and settings.start_from is not None else []
        for point in (*attrs.get("earlier", {}).get("points", ()), *given):
            if all(point != known for _, known in self.initial):
                self.initial.append((_name(named, point), point))
        self._is_grid = settings.sampler.name == "grid"
        if self._is_grid:
            points = [point for _, point in self.initial]
            self.initial += [(None, p) for p in every_point(space, points, seed=settings.seed, source=settings.source)]
        self._trials: StudyTrials | None = None
        self._num_ended = 0
        self._ended: dict[int, ObservedTrial] = {}
        self._known = (known or KnownCosts(settings, space)) if settings.sampler.name == "ehvi" else None

    def propose(self, claim: TrialRecord, trials: StudyTrials, *, attempt: int = 0) -> Proposal:
        """Choose the candidate of a slot.

        Args:
            trials: trials of the study, including the claimed one.
            attempt: how often this slot was proposed for; each attempt proposes another candidate.

        Raises:
            SearchSpaceExhausted: if no architecture was found that no other trial has.
        """
        ask = functools.partial(self._ask, self._past(claim, trials), self._noise(trials), claim.slot)
        attempts = [t for t in trials.by_slot[claim.slot] if isinstance(t, Candidate) and t.state == "failed"]
        place = trials.place(claim.slot)
        if self._is_grid and place >= len(self.initial):
            raise SearchSpaceExhausted(f"all {len(self.initial):,} architectures of the space were tried")
        given = self._given(place, [t.point for t in attempts])
        last: dict[str, int] | None = None
        for i in itertools.count(attempt):
            name, fixed = given if i == 0 else (None, None)
            if i >= attempt + MAX_SUGGESTIONS and fixed is None:
                break
            point, attrs = ask(i, fixed)
            if not self._space.valid(point):
                continue
            last, arch = point, self._space.architecture(point)
            same = _same_architecture(claim, trials, arch.id)
            if same is None:
                return Proposal(point, arch, name, attrs)
            others = (t for t in trials.of_architecture(arch.id) if t.number != claim.number and t.state != "failed")
            is_new_point = fixed is not None or all(t.point != point for t in others if isinstance(t, Candidate))
            if i == 0 and is_new_point and same.state == "scored" and not _keeps_repeating(trials):
                return Proposal(point, arch, name, attrs, same)
        return self._near(last, claim, trials, ask, attempt)

    def _past(self, claim: TrialRecord, trials: StudyTrials) -> list[ObservedTrial]:
        """The other candidates, but for failed ones; those that have ended are kept from one proposal to the next."""
        if trials is not self._trials:
            self._trials, self._num_ended, self._ended = trials, 0, {}
        new = trials.ended[self._num_ended :]
        self._num_ended += len(new)
        for t in new:
            if isinstance(t, Candidate) and t.state != "failed":
                first = t.number if t.continues is None else t.continues
                candidate = trials.candidate(first)
                assert isinstance(candidate, Candidate)
                self._ended[first] = self._observed(candidate)
                if self._known is not None:
                    self._known.observe(t)
        running = (t for t in trials.running.values() if isinstance(t, Candidate) and t.number != claim.number)
        running = (t for t in running if t.point.keys() == self.choices.keys())  # a point is written knob by knob
        ended = dict(self._ended)
        if self._settings.rungs is not None:
            # Paused candidates whose rung tells their quality; the others count as running.
            ranking = trials.ranking(self._settings)
            paused = ((c, ranking.predictions.get(c.number)) for c in ranking.paused)
            ended |= {c.number: self._observed(c, prediction) for c, prediction in paused if prediction}
        past = [*ended.values(), *(self._observed(t) for t in running if t.continues is None)]
        if self._settings.seeds is not None:
            for name, offsets in trials.ranking(self._settings).offsets.items():
                which = self._settings.objectives.index(name)
                # As if all had only the first seed: the others' values change, which are few.
                apart = [offsets[0] - offset for offset in offsets]
                past = [p.shifted(which, apart[round(p.runs) - 1]) if apart and p.runs > 1 else p for p in past]
        return past

    def _given(self, place: int, retried: Sequence[Mapping[str, int]]) -> tuple[str | None, Mapping[str, int] | None]:
        """Name and point of a slot whose point is given: an initial point, or that of the last trial it ``retried``.

        Args:
            place: number of new candidates before the slot's.
            retried: points of the slot's earlier trials.
        """
        name, point = self.initial[place] if place < len(self.initial) else (None, None)
        return (None, retried[-1]) if retried and retried[-1] != point else (name, point)

    def _noise(self, trials: StudyTrials) -> dict[str, float]:
        """Noise of one training run, relative to the quality, as an argument of the sampler that is told it."""
        if self._known is None or "noise" in self._settings.sampler.options:
            return {}
        return {"noise": trials.ranking(self._settings).noise[self._settings.quality_objectives[0]]}

    def _ask(
        self,
        past: Sequence[ObservedTrial],
        noise: Mapping[str, float],
        slot: int,
        attempt: int,
        fixed: Mapping[str, int] | None,
    ) -> tuple[dict[str, int], dict[str, Any]]:
        if (self._known or self._is_grid) and fixed is not None:
            return dict(fixed), {}  # not asked, so that nothing is counted before the first proposal
        return suggest(
            self._settings.sampler,
            past,
            self.choices,
            objectives=self._settings.objectives,
            seed=self._settings.seed,
            slot=slot,
            attempt=attempt,
            fixed=fixed,
            known={**self._known.sampler_arguments(), **noise} if self._known else None,
            source=self._settings.source,
        )

    def _near(
        self,
        last: Mapping[str, int] | None,
        claim: TrialRecord,
        trials: StudyTrials,
        ask: Callable[[int, Mapping[str, int]], tuple[dict[str, int], dict[str, Any]]],
        attempt: int,
    ) -> Proposal:
        """A new architecture where the sampler suggests only known ones: near its last point, else random, else any."""
        rng = random.Random(derive_seed(self._settings.seed, "point", claim.slot, attempt))
        for point in self._alternatives(last, rng):
            arch = self._space.architecture(point)
            if _same_architecture(claim, trials, arch.id) is None:
                attrs = ask(0, point)[1]  # some samplers count their suggestions
                return Proposal(point, arch, None, attrs)
        raise SearchSpaceExhausted("the space has no other architecture")

    def _alternatives(self, last: Mapping[str, int] | None, rng: random.Random) -> Iterator[dict[str, int]]:
        if last is not None:
            neighbors = list(self._space.neighbors(last))
            rng.shuffle(neighbors)
            yield from neighbors
        for _ in range(RANDOM_POINTS):
            yield self._space.sample(rng)
        if self._space.size() <= MAX_ENUMERATED:
            yield from filter(self._space.valid, self._space.points())

    def _observed(self, t: Candidate, predicted: Prediction | None = None) -> ObservedTrial:
        running = t.state == "running" or (t.state == "paused" and predicted is None)
        known = {self._settings.quality_objectives[0]: predicted.value} if predicted else {}
        values = (known.get(name, t.score.find(name)) for name in self._settings.objectives)
        return ObservedTrial(
            slot=t.slot,
            point=t.point,
            values=() if running else tuple(values),
            excess=max(t.constraints.values(), default=None),
            running=running,
            runs=predicted.runs if predicted else max(1, t.runs),
            sampler_attrs=t.sampler_attrs,
        )


def _name(named: Mapping[str, Mapping[str, int]], point: Mapping[str, int]) -> str | None:
    return next((name for name, named_point in named.items() if named_point == point), None)


def _same_architecture(claim: TrialRecord, trials: StudyTrials, architecture_id: str) -> TrialRecord | None:
    """Another trial of the architecture that is scored, infeasible, paused, running or abandoned, in this order."""
    order = ("scored", "infeasible", "paused", "running", "waiting", "failed")
    others = (t for t in trials.of_architecture(architecture_id) if t.number != claim.number)
    found = (t for t in others if t.state != "failed" or is_abandoned(trials.by_slot[t.slot]))
    return min(found, key=lambda t: order.index(t.state), default=None)


def _keeps_repeating(trials: StudyTrials) -> bool:
    """Whether the last `MAX_REUSED_IN_A_ROW` finished trials all reused a score."""
    ended = (t for t in reversed(trials) if t.state in ("scored", "infeasible"))
    last = list(itertools.islice(ended, MAX_REUSED_IN_A_ROW))
    return len(last) == MAX_REUSED_IN_A_ROW and all(t.reused_from is not None for t in last)
