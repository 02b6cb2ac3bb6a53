"""Summary of a search space: its size and the cost of its candidates, before any candidate is trained."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from archsearch.spaces.knob import Knob
from archsearch.spaces.space import CostFunction, HasCosts, Point, Space
from snapgen import seeding
from snapgen.architecture.schema import Architecture
from snapgen.progress import ProgressCallback, ignore_progress

MAX_SAMPLES = 200
MIN_SAMPLES = 20
SECONDS = 6.0
"""Approximate time for counting random samples; full-size nets take longer to count, so fewer are sampled."""


@dataclass(frozen=True)
class KnobSummary:
    """A knob's choices, whether they are ordered, and the index of the base's choice."""

    name: str
    choices: tuple[str, ...]
    ordered: bool
    base: int = 0


@dataclass(frozen=True)
class CandidateSummary:
    """One architecture of the space: the labels of its choices and its cost."""

    name: str
    id: str
    choices: Mapping[str, str]
    params: int
    macs: int
    activation_bytes: int
    within_limits: bool


@dataclass(frozen=True)
class SpaceSummary:
    """Summary of a space, as printed by `archsearch space show`.

    Attributes:
        size, log_size: number of points and its base-10 logarithm.
        distinct, distinct_is_exact: number of valid architectures with different ids, and whether it is exact.
        limits: constraints on cost.
        smallest, largest: candidates of the fewest and most params found by coordinate descent over the knobs. They
            are the true extremes unless one knob reverses the effect of another on params.
        middle: random sample with the median number of params.
        references: the base and every reference.
        samples: number of random valid points that were counted.
        within_limits: fraction of those samples that satisfy the constraints; 1 without constraints.
        can_be_met: whether any of the counted architectures satisfies the constraints.
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


def summarize(
    space: Space,
    cost_function: CostFunction,
    *,
    samples: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> SpaceSummary:
    """Summarize a space from its references, random points and extreme points.

    Args:
        space: space to summarize.
        cost_function: counts the cost of an architecture.
        samples: number of random points to count; None: as many as fit into `SECONDS`, between `MIN_SAMPLES` and
            `MAX_SAMPLES`.
        progress: called with the completed fraction, from 0 to 1, after each counted architecture.
    """
    counter = _Counter(space, cost_function)
    references = [counter.candidate(name, point) for name, point in space.reference_points().items()]
    if samples is None:
        samples = min(MAX_SAMPLES, max(MIN_SAMPLES, round(SECONDS / max(counter.fastest_seconds, 1e-6))))
    counter.progress, counter.counted = progress, 0
    counter.expected = samples + 3 * sum(len(_ends(knob)) - 1 for knob in space.knobs)
    rng = random.Random(seeding.derive_seed(0, "space summary"))
    points = sorted((space.sample(rng) for _ in range(samples)), key=lambda point: counter.candidate("", point).params)
    sampled = [counter.candidate("middle", point) for point in points]
    smallest = counter.candidate("smallest", _extreme(space, counter, -1, points[0]))
    largest = counter.candidate("largest", _extreme(space, counter, 1, points[-1]))
    distinct, exact = space.distinct()
    candidates = (*references, *sampled, smallest, largest)
    return SpaceSummary(
        name=space.name,
        digest=space.digest,
        latent_size=space.latent_size,
        context_tokens=space.context_tokens,
        knobs=knob_summaries(space),
        size=space.size(),
        log_size=space.log_size(),
        distinct=distinct,
        distinct_is_exact=exact,
        limits=dict(space.constraints),
        smallest=smallest,
        middle=sampled[(len(sampled) - 1) // 2],
        largest=largest,
        references=tuple(references),
        samples=samples,
        within_limits=statistics.fmean(candidate.within_limits for candidate in sampled),
        can_be_met=any(candidate.within_limits for candidate in candidates),
    )


def knob_summaries(space: Space) -> tuple[KnobSummary, ...]:
    """The knobs of a space."""
    return tuple(KnobSummary(k.name, k.choices, k.ordered, space.base_point[k.name]) for k in space.knobs)


@dataclass
class _Counter:
    """Counts each architecture of a space once, and reports progress."""

    space: Space
    cost_function: CostFunction
    costs: dict[str, HasCosts] = field(default_factory=dict)
    fastest_seconds: float = math.inf
    params_by_id: dict[str, int] = field(default_factory=dict)
    progress: ProgressCallback = ignore_progress
    counted: int = 0
    expected: int = 1

    def candidate(self, name: str, point: Point) -> CandidateSummary:
        arch = self.space.architecture(point)
        costs = self.costs.get(arch.id)
        if costs is None:
            started = time.perf_counter()
            costs = self.cost_function(arch, self.space.latent_size, context_tokens=self.space.context_tokens)
            self.fastest_seconds = min(self.fastest_seconds, time.perf_counter() - started)
            self.costs[arch.id] = costs
            self._counted()
        labels, within = self.space.labels(point), self.space.meets_constraints(costs)
        return CandidateSummary(name, arch.id, labels, costs.params, costs.macs, costs.activation_bytes, within)

    def params(self, point: Point) -> int:
        """Number of parameters only, from the shapes of the weights, without a forward pass."""
        arch = self.space.architecture(point)
        if arch.id in self.costs:
            return self.costs[arch.id].params
        if arch.id not in self.params_by_id:
            self.params_by_id[arch.id] = _params(arch)
            self._counted()
        return self.params_by_id[arch.id]

    def _counted(self) -> None:
        self.counted += 1
        self.progress(min(1.0, self.counted / self.expected))


def _params(arch: Architecture) -> int:
    from snapgen.models.unet import UNet  # slow to import

    with torch.device("meta"):
        return int(UNet(arch).num_parameters())


def _extreme(space: Space, counter: _Counter, sign: int, sampled: Point) -> Point:
    """The point of the most (sign 1) or fewest (-1) params, by coordinate descent.

    The descent starts from each knob's best single change to the base, combined as far as the combination is valid, or
    from the sampled point if that is better. It then changes one knob at a time to its best choice until a full round
    over the knobs changes nothing. For ordered knobs only the first and the last choice are tried.
    """

    def rank(point: Point) -> int:
        return sign * counter.params(point)

    base = space.base_point
    point: Point = dict(base)
    for knob in space.knobs:
        moved = {**point, knob.name: max(_moves(space, base, knob), key=rank)[knob.name]}
        point = moved if space.valid(moved) else point
    point = max(point, sampled, key=rank)
    while True:
        start = point
        for knob in space.knobs:
            point = max([point, *_moves(space, point, knob)], key=rank)  # ties keep the current point, so this ends
        if point == start:
            return point


def _moves(space: Space, point: Point, knob: Knob) -> list[Point]:
    """This point, and the valid points with another of the knob's possibly extreme choices."""
    return [point, *filter(space.valid, ({**point, knob.name: i} for i in _ends(knob)))]


def _ends(knob: Knob) -> tuple[int, ...]:
    """Choices that may be extreme: the first and the last of an ordered knob, all of an unordered one."""
    last = len(knob.choices) - 1
    return (0, last) if knob.ordered else tuple(range(last + 1))
