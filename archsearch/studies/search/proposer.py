"""Which architecture a slot is for: a reference's, the sampler's, or, where that is known already, one near it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from archsearch.score import OBJECTIVES, MissingScore, Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.samplers import Past, distributions, suggest
from archsearch.studies.storage.trial_queue import ClaimedTrial, is_abandoned, slots_of
from snapgen.architecture.schema import Architecture
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from archsearch.spaces.space import Space

ASKS = 2
"""How often the sampler is asked for one slot before a point near its last one is taken."""

RANDOM_POINTS = 300
SMALL_SPACE = 4096
"""Spaces of at most so many points are gone through before they are said to hold nothing new."""

REUSED_IN_A_ROW = 5
"""So many known architectures are recorded in a row; after that the sampler is asked anew without a record."""


class SearchSpaceExhausted(Exception):
    """There is no other architecture to propose; the message says why."""


@dataclass(frozen=True)
class Proposal:
    """What a slot is for. ``same_as``: the scored trial of the same architecture."""

    point: dict[str, int]
    architecture: Architecture
    name: str | None
    sampler_attrs: Mapping[str, Any]
    same_as: FrozenTrial | None = None


class CandidateProposer(Protocol):
    """What a worker asks for a slot's candidate."""

    @property
    def choices(self) -> Mapping[str, Any]:
        """Optuna's distribution of each knob."""

    def propose(self, claim: ClaimedTrial, trials: Sequence[FrozenTrial], *, attempt: int = 0) -> Proposal:
        """See `Proposer.propose`."""


ProposerFactory = Callable[[StudyConfig, "Space"], CandidateProposer]


class Proposer:
    """Turns slots into proposals. What it proposes depends on the trials, the slot and the settings alone."""

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        self._settings, self._space = settings, space
        self.choices: Mapping[str, Any] = distributions(space)
        named = space.points_of()
        self.first = [(_name(named, point), point) for point in settings.plan] or list(named.items())
        """The points of the first slots, by name where they have one: the plan, or the base and the references."""

    def propose(self, claim: ClaimedTrial, trials: Sequence[FrozenTrial], *, attempt: int = 0) -> Proposal:
        """A candidate for a slot.

        Args:
            trials: of the study, the claim's own included.
            attempt: how often this slot has been proposed for; a higher one gives something else.

        Raises:
            Exhausted: if no architecture could be found that is not known already.
        """
        others = [t for t in trials if t.number != claim.number]
        past = list(self._past(others))
        known = _known(others)
        last: dict[str, int] | None = None
        for i in itertools.count(attempt):
            name, fixed = self._fixed(claim, i)
            if i >= attempt + ASKS and fixed is None:
                break
            point, attrs = self._ask(past, claim.slot, i, fixed)
            if not self._space.valid(point):
                continue
            last, arch = point, self._space.architecture(point)
            same = known.get(arch.id)
            if same is None:
                return Proposal(point, arch, name, attrs)
            is_new_point = fixed is not None or all(dict(p.point) != point for p in past)
            if i == 0 and is_new_point and same.state.name == "COMPLETE" and not _repeats_itself(others):
                return Proposal(point, arch, name, attrs, same)
        return self._near(last, known, past, claim.slot, attempt)

    def _fixed(self, claim: ClaimedTrial, attempt: int) -> tuple[str | None, Mapping[str, int] | None]:
        """The point that the slot is for by the plan, at the first attempt, and its name."""
        if attempt > 0:
            return None, None
        name, point = self.first[claim.slot] if claim.slot < len(self.first) else (None, None)
        return (name, point) if claim.point in (None, point) else (None, claim.point)

    def _ask(
        self, past: Sequence[Past], slot: int, attempt: int, fixed: Mapping[str, int] | None
    ) -> tuple[dict[str, int], dict[str, Any]]:
        return suggest(
            self._settings.sampler,
            past,
            self.choices,
            objectives=self._settings.objectives,
            seed=self._settings.seed,
            slot=slot,
            attempt=attempt,
            fixed=fixed,
            source=self._settings.source,
        )

    def _near(
        self, last: Mapping[str, int] | None, known: Mapping[str, object], past: Sequence[Past], slot: int, attempt: int
    ) -> Proposal:
        """The sampler insists on what is known: a neighbour of its last point, else a random one, else any."""
        rng = random.Random(derive_seed(self._settings.seed, "point", slot, attempt))
        for point in self._elsewhere(last, rng):
            arch = self._space.architecture(point)
            if arch.id not in known:
                return Proposal(*self._asked(point, arch, past, slot))
        raise SearchSpaceExhausted("the space has no other architecture")

    def _asked(
        self, point: dict[str, int], arch: Architecture, past: Sequence[Past], slot: int
    ) -> tuple[dict[str, int], Architecture, None, dict[str, Any]]:
        return point, arch, None, self._ask(past, slot, 0, point)[1]

    def _elsewhere(self, last: Mapping[str, int] | None, rng: random.Random) -> Iterator[dict[str, int]]:
        if last is not None:
            near = list(self._space.neighbours(last))
            rng.shuffle(near)
            yield from near
        for _ in range(RANDOM_POINTS):
            yield self._space.sample(rng)
        if self._space.size() <= SMALL_SPACE:
            yield from filter(self._space.valid, self._space.points())

    def _past(self, trials: Sequence[FrozenTrial]) -> Iterator[Past]:
        slots = slots_of(trials)
        for t in trials:
            running = t.state.name == "RUNNING"
            if t.state.name == "FAIL" or "architecture" not in t.user_attrs:
                continue
            limits = t.constraints.values()
            yield Past(
                slot=slots[t.number],
                point=t.params,
                values=() if running else self._values(t),
                excess=max(limits) if limits else None,
                running=running,
                system_attrs={k: v for k, v in t.system_attrs.items() if _is_samplers(k)},
            )

    def _values(self, t: FrozenTrial) -> tuple[float | None, ...]:
        score = Score.model_validate(t.user_attrs["score"])
        return tuple(_value(score, name) for name in self._settings.objectives)


def _name(named: Mapping[str, Mapping[str, int]], point: Mapping[str, int]) -> str | None:
    return next((name for name, other in named.items() if other == point), None)


def _is_samplers(key: str) -> bool:
    return not key.startswith(("constraints", "artifacts:"))


def _value(score: Score, objective: str) -> float | None:
    try:
        return OBJECTIVES[objective].getter(score)
    except MissingScore:
        return None


def _known(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """A trial of every architecture that is scored, infeasible, given up or under way, by id; a scored one first."""
    slots = slots_of(trials)
    rank = {"COMPLETE": 0, "PRUNED": 1, "RUNNING": 2, "FAIL": 3}
    known: dict[str, FrozenTrial] = {}
    for t in sorted(trials, key=lambda t: (rank.get(t.state.name, 4), t.number)):
        failed_for_good = t.state.name == "FAIL" and is_abandoned(
            [o for o in trials if slots[o.number] == slots[t.number]]
        )
        arch_id = t.user_attrs.get("architecture_id")
        if arch_id is not None and (t.state.name != "FAIL" or failed_for_good):
            known.setdefault(arch_id, t)
    return known


def _repeats_itself(trials: Sequence[FrozenTrial]) -> bool:
    ended = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")][-REUSED_IN_A_ROW:]
    return len(ended) == REUSED_IN_A_ROW and all(t.user_attrs.get("reused_from") is not None for t in ended)
