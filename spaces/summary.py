"""What a space holds and what its candidates cost, before anyone spends a minute on one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from snapgen import seeds
from snapgen.arch import Architecture
from spaces.knob import Knob

if TYPE_CHECKING:
    from spaces.space import Point, Space

MOST_SAMPLES = 200
FEWEST_SAMPLES = 20
SECONDS = 8.0
"""About how long the random samples may take; a full-size net takes long to count, so fewer are."""


class Costs(Protocol):
    """The costs of one forward pass, as `archsearch.cost.cost` counts them."""

    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...
    @property
    def activation_bytes(self) -> int: ...


class CostFunction(Protocol):
    """`archsearch.cost.cost`, or anything like it."""

    def __call__(self, arch: Architecture, latent_size: int, *, context_tokens: int) -> Costs: ...


@dataclass(frozen=True)
class KnobSummary:
    """A knob: its choices by name, which of them is the base's, and whether they stand in order."""

    name: str
    choices: tuple[str, ...]
    ordered: bool
    base: int


@dataclass(frozen=True)
class Member:
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
        smallest, largest: by params, as found by going through the knobs one by one (`_extreme`): the true ones where
            the knobs' effects on params do not turn round each other, near them otherwise.
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
    smallest: Member
    middle: Member
    largest: Member
    references: tuple[Member, ...]
    samples: int
    within_limits: float
    can_be_met: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def summarise(
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
    started = time.perf_counter()
    costs = _Counter(space, cost_function)
    references = [costs.member(name, point) for name, point in space.points_of().items()]
    each = (time.perf_counter() - started) / len(costs.known)
    if samples is None:
        samples = min(MOST_SAMPLES, max(FEWEST_SAMPLES, round(SECONDS / each)))
    costs.told(progress, total=samples + 3 * sum(len(knob.choices) - 1 for knob in space.knobs))
    rng = random.Random(seeds.derive(0, "space summary"))
    drawn = sorted((costs.member("middle", space.sample(rng)) for _ in range(samples)), key=lambda m: m.params)
    smallest, largest = (costs.member(name, _extreme(space, costs, sign)) for name, sign in _EXTREMES)
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


_EXTREMES = (("smallest", -1), ("largest", 1))


@dataclass
class _Counter:
    """Counts architectures, each once."""

    space: Space
    cost_function: CostFunction
    known: dict[str, Costs] = field(default_factory=dict)
    progress: Callable[[float], None] = lambda _: None
    total: int = 0

    def told(self, progress: Callable[[float], None], total: int) -> None:
        self.progress, self.total = progress, total + len(self.known)

    def __call__(self, point: Point) -> Costs:
        arch = self.space.architecture(point)
        if arch.id not in self.known:
            tokens = self.space.context_tokens
            self.known[arch.id] = self.cost_function(arch, self.space.latent_size, context_tokens=tokens)
            if self.total:
                self.progress(min(1.0, len(self.known) / self.total))
        return self.known[arch.id]

    def member(self, name: str, point: Point) -> Member:
        costs = self(point)
        within = self.space.within_limits(costs)
        ident = self.space.architecture(point).id
        labels = self.space.labels(point)
        return Member(name, ident, labels, costs.params, costs.macs, costs.activation_bytes, within)


def _extreme(space: Space, costs: _Counter, sign: int) -> Point:
    """The point of most (sign 1) or least (-1) params, by coordinate descent.

    Every knob is first moved alone from the base to its best choice; all those moves together, as far as they fit,
    are where the descent starts. It then goes through the knobs, taking whatever choice is better, until a whole
    round takes none.
    """
    base = space.base_point
    best = {knob.name: max(_choices(space, base, knob), key=lambda p: sign * costs(p).params) for knob in space.knobs}
    point: Point = dict(base)
    for knob in space.knobs:
        moved = {**point, knob.name: best[knob.name][knob.name]}
        point = moved if space.valid(moved) else point
    while True:
        before = costs(point).params
        for knob in space.knobs:
            point = max([point, *_choices(space, point, knob)], key=lambda p: sign * costs(p).params)
        if costs(point).params == before:
            return point


def _choices(space: Space, point: Point, knob: Knob) -> Iterable[Point]:
    """The valid points that differ from this one in that knob at most."""
    return list(filter(space.valid, ({**point, knob.name: i} for i in range(len(knob.choices)))))
