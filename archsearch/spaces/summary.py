"""What a space holds and what its candidates cost, before anyone spends a minute on one."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from archsearch.spaces.knob import Knob
from archsearch.spaces.space import CostFunction, HasCosts
from snapgen import seeding
from snapgen.architecture.schema import Architecture

if TYPE_CHECKING:
    from archsearch.spaces.space import Point, Space


MOST_SAMPLES = 200


FEWEST_SAMPLES = 20


SECONDS = 6.0
"""About how long the random samples may take; a full-size net takes long to count, so fewer are."""


@dataclass(frozen=True)
class KnobSummary:
    """A knob: its choices by name, which of them is the base's, and whether they stand in order."""

    name: str
    choices: tuple[str, ...]
    ordered: bool
    base: int


@dataclass(frozen=True)
class CandidateSummary:
    """One architecture of the space: its point in words and what it costs."""

    name: str
    id: str
    choices: Mapping[str, str]
    params: int
    macs: int
    activation_bytes: int
    within_limits: bool


@dataclass(frozen=True)
class SpaceSummary:
    """What `archsearch space show` prints.

    Attributes:
        size, log_size: points, and the base-10 logarithm of their number.
        distinct, distinct_is_exact: valid architectures with different ids, counted or estimated.
        smallest, largest: by params, as found by going through the knobs one by one, ordered ones at their ends: the
            true ones unless the knobs' effects on params turn each other round.
        middle: the random sample of median params.
        references: the base's and every reference's cost.
        samples: random valid points that were counted.
        within_limits: the share of those samples that meet the limits; 1 without limits.
        can_be_met: whether any architecture that was looked at meets the limits.
    """

    name: str
    digest: str
    latent_size: int
    context_tokens: int
    knobs: tuple[KnobSummary, ...]
    size: int
    log_size: float
    distinct: int
    distinct_is_exact: bool
    limits: Mapping[str, float]
    smallest: CandidateSummary
    middle: CandidateSummary
    largest: CandidateSummary
    references: tuple[CandidateSummary, ...]
    samples: int
    within_limits: float
    can_be_met: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def summarize(
    space: Space,
    cost_function: CostFunction,
    *,
    samples: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> SpaceSummary:
    """Goes through a space's knobs and some random points of it.

    Args:
        space: what to look at.
        cost_function: counts the cost of an architecture.
        samples: random points to count; None: `MOST_SAMPLES`, or as many as fit into `SECONDS`, but `FEWEST_SAMPLES`.
        progress: told the share done, from 0 to 1, after each architecture that was counted.
    """
    counter = _Counter(space, cost_function)
    references = [counter.member(name, point) for name, point in space.points_of().items()]
    if samples is None:
        samples = min(MOST_SAMPLES, max(FEWEST_SAMPLES, round(SECONDS / max(counter.least_seconds, 1e-6))))
    counter.tell(progress, expected=samples + 3 * sum(len(_ends(knob)) - 1 for knob in space.knobs))
    rng = random.Random(seeding.derive_seed(0, "space summary"))
    points = sorted((space.sample(rng) for _ in range(samples)), key=lambda point: counter.member("", point).params)
    drawn = [counter.member("middle", point) for point in points]
    smallest = counter.member("smallest", _extreme(space, counter, -1, points[0]))
    largest = counter.member("largest", _extreme(space, counter, 1, points[-1]))
    distinct, exact = space.distinct()
    members = (*references, *drawn, smallest, largest)
    return SpaceSummary(
        name=space.name,
        digest=space.digest,
        latent_size=space.latent_size,
        context_tokens=space.context_tokens,
        knobs=tuple(KnobSummary(k.name, k.choices, k.ordered, space.base_point[k.name]) for k in space.knobs),
        size=space.size(),
        log_size=space.log_size(),
        distinct=distinct,
        distinct_is_exact=exact,
        limits=dict(space.limits),
        smallest=smallest,
        middle=drawn[(len(drawn) - 1) // 2],
        largest=largest,
        references=tuple(references),
        samples=samples,
        within_limits=statistics.fmean(member.within_limits for member in drawn),
        can_be_met=any(member.within_limits for member in members),
    )


@dataclass
class _Counter:
    """Counts a space's architectures, each once, and tells how far it has come."""

    space: Space
    cost_function: CostFunction
    costs: dict[str, HasCosts] = field(default_factory=dict)
    least_seconds: float = math.inf
    known_params: dict[str, int] = field(default_factory=dict)
    progress: Callable[[float], None] = lambda _: None
    left: int = 0
    expected: int = 0

    def tell(self, progress: Callable[[float], None], *, expected: int) -> None:
        self.progress, self.left, self.expected = progress, expected, expected

    def member(self, name: str, point: Point) -> CandidateSummary:
        arch = self.space.architecture(point)
        costs = self.costs.get(arch.id)
        if costs is None:
            started = time.perf_counter()
            costs = self.cost_function(arch, self.space.latent_size, context_tokens=self.space.context_tokens)
            self.least_seconds = min(self.least_seconds, time.perf_counter() - started)
            self.costs[arch.id] = costs
            self._counted()
        labels, within = self.space.labels(point), self.space.within_limits(costs)
        return CandidateSummary(name, arch.id, labels, costs.params, costs.macs, costs.activation_bytes, within)

    def params(self, point: Point) -> int:
        """Parameters alone: a net's shapes say them, without going through a forward pass."""
        arch = self.space.architecture(point)
        if arch.id in self.costs:
            return self.costs[arch.id].params
        if arch.id not in self.known_params:
            self.known_params[arch.id] = _params(arch)
            self._counted()
        return self.known_params[arch.id]

    def _counted(self) -> None:
        self.left = max(0, self.left - 1)
        if self.expected:
            self.progress(1 - self.left / self.expected)


def _params(arch: Architecture) -> int:
    import torch

    from snapgen.models.unet import UNet

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(arch).parameters())


def _extreme(space: Space, counter: _Counter, sign: int, known: Point) -> Point:
    """The point of most (sign 1) or least (-1) params, by coordinate descent.

    Every knob is first moved alone from the base to its best choice; all those moves together, as far as they fit,
    are where the descent starts, unless a known point is better. It then goes through the knobs, taking whatever choice
    is better, until a whole round takes none. Of ordered choices only the first and the last are tried.
    """

    def rank(point: Point) -> int:
        return sign * counter.params(point)

    base = space.base_point
    point: Point = dict(base)
    for knob in space.knobs:
        moved = {**point, knob.name: max(_moves(space, base, knob), key=rank)[knob.name]}
        point = moved if space.valid(moved) else point
    point = max(point, known, key=rank)
    while True:
        start = point
        for knob in space.knobs:
            point = max([point, *_moves(space, point, knob)], key=rank)  # of equals the first: it ends
        if point == start:
            return point


def _moves(space: Space, point: Point, knob: Knob) -> list[Point]:
    """This point, and the valid ones with another of the knob's choices that may be extreme."""
    return [point, *filter(space.valid, ({**point, knob.name: i} for i in _ends(knob)))]


def _ends(knob: Knob) -> tuple[int, ...]:
    last = len(knob.choices) - 1
    return (0, last) if knob.ordered else tuple(range(last + 1))
