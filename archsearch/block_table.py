"""What each block of a net costs in milliseconds on a device, from times of whole nets (arXiv 2306.00980, 3.2).

A backend times whole nets alone, so the blocks' shares are solved for: the net is timed as it is, without any block,
without each place's blocks, and with more copies of each, and a non-negative model is fitted (`archsearch.regression`)
in which a net's time is a fixed part, a first block's part in every place that has blocks, and a copy's part for every
further one there. The first residual block of a place may change the width, so its copies are blocks of another shape.

What such a sum is worth is measured too, on random sub-networks that had no part in the fit. If one of them is missed
by more than `TOLERATED`, it is corrected by them in two ways, and their errors are then those of corrections that left
each out: a *refit*, in which they count as the other nets do, which mends single costs; and a *curve*, a power of the
sum, which mends what all blocks have in common, as where a device does several at a time. The better one is taken.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from archsearch.latency import Backend
from archsearch.regression import Array, Evidence, Prior, fit, flat_prior
from archsearch.score import LatencyRecord
from archsearch.timings import TRIES, in_turns
from snapgen import seeds, settings, subnets
from snapgen.arch import Architecture
from snapgen.errors import InputError
from snapgen.settings import Settings
from snapgen.subnets import Block, Kind, Place

TOLERATED = 0.10
"""Relative error of a sub-network's predicted time, over which the table is corrected."""

SUREST, VAGUEST = 0.005, 0.16
"""Relative error of one net's measured time, at least and at most, whatever its records say."""
EXACT = 0.001
"""And of a predicted one."""

FEWEST = 4
"""Sub-networks under which nothing is corrected by them."""

LEAST_KEPT = 0.25
"""A random sub-network keeps each block with a probability between this and one."""
COPYING = 0.25
"""And every other sub-network has a copy of a block that it keeps with this probability."""


class TableSettings(Settings):
    """How a table is filled."""

    copies: int = Field(default=3, ge=1, le=16)
    """More of a block in the net that its copies' cost is taken from."""
    check: int = Field(default=20, ge=0, le=1000)
    """Random sub-networks that the sums are held to."""
    seed: int = Field(default=0, ge=0)
    """Of these."""
    least: int = Field(default=3, ge=1, le=100)
    """Measurements of each net; predictions are taken once."""
    most: int = Field(default=8, ge=1, le=100)
    """And further ones until the two lowest agree, up to so many."""


class Measured(Settings):
    """A net that was timed.

    The lowest of its medians counts: what disturbs a measurement only ever adds to it.
    """

    what: str
    use: Literal["fill", "check"]
    architecture_id: str
    counts: tuple[int, ...]
    """Blocks in each of the table's places."""
    records: tuple[LatencyRecord, ...] = Field(min_length=1)
    """All of them."""

    @property
    def ms(self) -> float:
        """The time that counts."""
        return min(record.median_ms for record in self.records)

    @property
    def tolerance(self) -> float:
        """Relative error of `ms`: its runs' spread, or what the two lowest records are apart, if that is more.

        Predictions have no such spread; what they are wrong by, they are wrong by together (`EXACT`).
        """
        first, *others = sorted(self.records, key=lambda record: record.median_ms)
        if not first.runs:
            return EXACT
        spread = (first.upper_quartile_ms - first.lower_quartile_ms) / first.runs**0.5
        apart = others[0].median_ms - first.median_ms if others else 0.0
        return float(np.clip(max(spread, apart) / first.median_ms, SUREST, VAGUEST))


class PlaceCost(Settings):
    """What the blocks of one layer and kind cost."""

    site: str
    layer: int
    kind: Kind
    ms: float = Field(ge=0)
    """The first."""
    copy_ms: float = Field(ge=0)
    """Each one after it."""

    @property
    def place(self) -> Place:
        """As its blocks have it."""
        return self.site, self.layer, self.kind


class Check(Settings):
    """Relative errors of predicted times, of nets that the prediction does not know: +0.1 is a tenth too much."""

    errors: tuple[float, ...] = Field(min_length=1)

    @property
    def median(self) -> float:
        """Of the magnitudes."""
        return float(np.median(np.abs(self.errors)))

    @property
    def largest(self) -> float:
        """Of the magnitudes."""
        return max(map(abs, self.errors))

    @property
    def bias(self) -> float:
        """The mean error, with its sign."""
        return float(np.mean(self.errors))

    @property
    def within(self) -> float:
        """The share that is off by no more than `TOLERATED`."""
        return float(np.mean(np.abs(self.errors) <= TOLERATED))


Correction = Literal["refit", "curve"]


class BlockTable(Settings):
    """The costs of a net's blocks on one device, all that they were taken from, and what their sums are worth."""

    version: Literal[1] = 1
    architecture: Architecture
    latent_size: int
    context_tokens: int
    settings: TableSettings
    source: Literal["measured", "predicted", "published"]
    device: str
    compute_units: str
    chip: str
    os: str
    threads: int | None = None
    runtime: str
    fixed_ms: float = Field(ge=0)
    """What is left without any block."""
    floor_ms: float = Field(gt=0)
    """The least that a block is said to cost: the standard error of a block's cost in the fit, the median of them all.
    A fit may give a block nothing, but cannot tell less than that from nothing."""
    costs: tuple[PlaceCost, ...] = Field(min_length=1)
    """In the order of the forward pass."""
    scale: float = Field(default=1, gt=0)
    power: float = Field(default=1, gt=0)
    """A net takes ``scale · sum ** power`` milliseconds; other than 1 where the curve corrects."""
    before: Check | None = None
    """Of sums fitted to nets with one kind of change each; None where no sub-network was taken."""
    tried: dict[Correction, Check] = Field(default_factory=dict)
    """Of each correction by the other sub-networks, each one left out in turn; none where there was no need."""
    correction: Correction | None = None
    """The one that is made: of those tried the best, if it is better than none."""
    measured: tuple[Measured, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if [cost.place for cost in self.costs] != list(_counts(self.architecture)):
            raise ValueError("its costs are not of its architecture's blocks; fill the table again")
        if any(len(net.counts) != len(self.costs) for net in self.measured):
            raise ValueError("a measured net has not a count for every place; fill the table again")
        conditions = {record.conditions for net in self.measured for record in net.records}
        if conditions != {self.conditions}:
            raise ValueError(f"records of different conditions: {_difference(conditions | {self.conditions})}")
        return self

    @classmethod
    def load(cls, path: Path) -> BlockTable:
        """From a file.

        Raises:
            InputError: if it is no such table.
        """
        return settings.load(path, cls)

    def to_json(self) -> str:
        """As `load` reads it."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    @property
    def conditions(self) -> tuple[str, ...]:
        """As `LatencyRecord.conditions`."""
        return self.source, self.device, self.compute_units, self.chip, str(self.threads), self.runtime

    @property
    def whole_ms(self) -> float:
        """The time of the net itself, as measured (or predicted by the backend)."""
        return self.measured[0].ms

    @property
    def after(self) -> Check | None:
        """Of the best correction that was tried, made or not; None where there was no need."""
        return min(self.tried.values(), key=lambda check: check.largest, default=None)

    @property
    def corrected(self) -> bool:
        """Whether there was need of a correction, and one did better than none."""
        return self.correction is not None

    @property
    def share(self) -> float:
        """What a part's milliseconds are to be taken times: 1, or what the curve makes of the whole net's."""
        whole = self._sum(_counts(self.architecture))
        return self.scale * float(whole**self.power) / whole

    def of(self, block: Block) -> float:
        """Milliseconds of a block, at least ``floor_ms``; of one after the first of its place, a copy's.

        Raises:
            InputError: if the net has no block in that place.
        """
        cost = next((cost for cost in self.costs if cost.place == block.place), None)
        if cost is None:
            raise InputError("block table", f"has no place of {block.label}", "fill one for this net")
        return max(self.share * (cost.copy_ms if block.index else cost.ms), self.floor_ms)

    def predict(self, arch: Architecture) -> float:
        """Milliseconds of a sub-network: of the sum of its blocks' parts, without a floor, and the fixed part.

        Raises:
            InputError: if the two nets differ in more than how many blocks stand where.
        """
        counts = _counts(arch)
        if not counts.keys() <= {cost.place for cost in self.costs} or _dealt(self.architecture, counts).id != arch.id:
            problem = f"{arch.id} is no sub-network of the table's net {self.architecture.id}"
            raise InputError("block table", problem, "fill one for this net")
        return self.scale * float(self._sum(counts) ** self.power)

    def _sum(self, counts: Mapping[Place, int]) -> float:
        costs = np.array([self.fixed_ms, *itertools.chain(*((cost.ms, cost.copy_ms) for cost in self.costs))])
        return float(_features([counts.get(cost.place, 0) for cost in self.costs]) @ costs)


def fill(
    backend: Backend,
    arch: Architecture,
    latent_size: int,
    context_tokens: int,
    options: TableSettings | None = None,
    *,
    known: Mapping[str, Sequence[LatencyRecord]] | None = None,
    keep: Callable[[Architecture, LatencyRecord], None] = lambda *_: None,
    tell: Callable[[float], None] = lambda _: None,
) -> BlockTable:
    """Take the times of a net and of its sub-networks, in turns, and make the table of them.

    Args:
        backend: any; it is asked for whole nets alone.
        known: records that there are already, by architecture id; each counts as one of the measurements.
        keep: given each new record as it comes, so that a fill that was killed goes on from there.
        tell: told the share done.

    Raises:
        InputError: if the net has no block, does not take such a latent, has too few sub-networks to check, or the
            records are of different conditions.
        LatencyFailure, DeviceLost: as the backend's.
    """
    options = options or TableSettings()
    arch.check_latent(latent_size)
    plan = list(_planned(arch, options))
    records = {net.id: list((known or {}).get(net.id, ())) for _, _, net in plan}

    def kept(net: Architecture, record: LatencyRecord) -> None:
        _check_conditions([record, *itertools.chain(*records.values())])
        keep(net, record)

    _check_conditions(list(itertools.chain(*records.values())))
    for done in in_turns(
        backend,
        [net for _, _, net in plan],
        records,
        latent_size=latent_size,
        context_tokens=context_tokens,
        keep=kept,
        least=options.least,
        most=options.most,
    ):
        tell(done)
    places = list(_counts(arch))
    measured = [
        Measured(
            what=what,
            use=use,
            architecture_id=net.id,
            counts=tuple(_counts(net).get(place, 0) for place in places),
            records=tuple(records[net.id]),
        )
        for what, use, net in plan
    ]
    return _solved(arch, places, measured, settings=options, latent_size=latent_size, context_tokens=context_tokens)


Planned = tuple[str, Literal["fill", "check"], Architecture]


def _planned(arch: Architecture, options: TableSettings) -> Iterator[Planned]:
    """Every net to be timed: in words, what for, and itself; the whole net is the first, and none is there twice."""
    whole = _counts(arch)
    if not whole:
        raise InputError("architecture", "has no block", "give it a residual block or a transformer")
    found: list[Planned] = [("the whole net", "fill", arch), ("without any block", "fill", _dealt(arch, {}))]
    for place, count in whole.items():
        label = Block("", place[2], place[0], place[1], 0).label
        more = {**whole, place: count + options.copies}
        found.append((f"without {label}", "fill", _dealt(arch, {**whole, place: 0})))
        found.append((f"{options.copies} more of {label}", "fill", _dealt(arch, more)))
    unique = {net.id: (what, use, net) for what, use, net in reversed(found)}
    yield from reversed(unique.values())
    yield from _drawn(arch, options, set(unique))


def _drawn(arch: Architecture, options: TableSettings, taken: set[str]) -> Iterator[Planned]:
    """Random sub-networks, each of a seed of its own: more of them begin with the same ones."""
    drawn = 0
    for attempt in range(options.check * TRIES):
        if drawn == options.check:
            return
        rng = random.Random(seeds.derive(options.seed, arch.id, "sub-networks", attempt))
        keep, copy = rng.uniform(LEAST_KEPT, 1), rng.choice((0.0, COPYING))
        counts: Counter[Place] = Counter()
        for block in subnets.blocks(arch):
            kept, copied = rng.random() < keep, rng.random() < copy
            counts[block.place] += kept + (kept and copied)
        net = _dealt(arch, counts)
        if net.id not in taken:
            taken.add(net.id)
            drawn += 1
            yield f"sub-network {drawn}", "check", net
    if drawn < options.check:
        problem = f"has {drawn} sub-networks beside those that the table is filled from, fewer than {options.check}"
        raise InputError("architecture", problem, "check fewer")


def _counts(arch: Architecture) -> dict[Place, int]:
    """How many blocks stand in each place that has any, in the order of the forward pass."""
    return dict(Counter(block.place for block in subnets.blocks(arch)))


def _dealt(arch: Architecture, counts: Mapping[Place, int]) -> Architecture:
    """The net with so many blocks in each of the places where it has any; none where nothing is said."""
    removed: list[str] = []
    copied: list[str] = []
    for place, group in itertools.groupby(
        sorted(subnets.blocks(arch), key=lambda block: block.place), key=lambda block: block.place
    ):
        names = [block.name for block in group]
        wanted = counts.get(place, 0)
        removed += names[wanted:]
        copied += names[:1] * max(0, wanted - len(names))
    return subnets.changed(arch, removed, copied)


def _features(counts: Sequence[int]) -> Array:
    """1, and for every place whether it has a block and how many more: (1 + 2 · places,)."""
    return np.array([1.0, *itertools.chain(*((min(count, 1), max(count - 1, 0)) for count in counts))])


def _solved(
    arch: Architecture,
    places: Sequence[Place],
    measured: Sequence[Measured],
    *,
    settings: TableSettings,
    latent_size: int,
    context_tokens: int,
) -> BlockTable:
    filling = [_evidence(net) for net in measured if net.use == "fill"]
    checking = [_evidence(net) for net in measured if net.use == "check"]
    prior = flat_prior(np.array([e.features for e in filling]), np.array([e.value for e in filling]))
    found, scale, power = fit(filling, prior), 1.0, 1.0
    before = Check(errors=tuple(e.ratio(found.coefficients) - 1 for e in checking)) if checking else None
    tried: dict[Correction, Check] = {}
    if before and before.largest > TOLERATED and len(checking) >= FEWEST:
        tried = {"refit": _refitted(filling, checking, prior), "curve": _curved(checking, found.coefficients)}
    correction = min(tried, key=lambda name: tried[name].largest, default=None)
    if correction and before and tried[correction].largest >= before.largest:
        correction = None
    if correction == "refit":
        found = fit([*filling, *checking], prior)
    if correction == "curve":
        scale, power = _curve(checking, found.coefficients)
    fixed, *costs = found.coefficients.tolist()
    first = measured[0].records[0]
    return BlockTable(
        **first.model_dump(include={"source", "device", "compute_units", "chip", "os", "threads", "runtime"}),
        architecture=arch,
        latent_size=latent_size,
        context_tokens=context_tokens,
        settings=settings,
        fixed_ms=fixed,
        floor_ms=float(np.median(np.sqrt(np.diag(found.covariance)[1:]))),
        costs=tuple(
            PlaceCost(site=site, layer=layer, kind=kind, ms=ms, copy_ms=copy_ms)
            for (site, layer, kind), ms, copy_ms in zip(places, costs[::2], costs[1::2], strict=True)
        ),
        scale=scale,
        power=power,
        before=before,
        tried=tried,
        correction=correction,
        measured=tuple(measured),
    )


def _evidence(net: Measured) -> Evidence:
    return Evidence(_features(net.counts), net.ms, net.tolerance)


def _refitted(filling: Sequence[Evidence], checking: Sequence[Evidence], prior: Prior) -> Check:
    """Errors of sums that are fitted to all nets but the one foretold."""
    fits = [fit([*filling, *others], prior).coefficients for others in _all_but_one(checking)]
    return Check(errors=tuple(e.ratio(found) - 1 for e, found in zip(checking, fits, strict=True)))


def _curved(checking: Sequence[Evidence], coefficients: Array) -> Check:
    """Errors of powers of the sum that are fitted to all sub-networks but the one foretold."""
    curves = [_curve(others, coefficients) for others in _all_but_one(checking)]
    sums = [float(e.features @ coefficients) for e in checking]
    times = [scale * total**power for total, (scale, power) in zip(sums, curves, strict=True)]
    return Check(errors=tuple(ms / e.value - 1 for ms, e in zip(times, checking, strict=True)))


def _curve(nets: Sequence[Evidence], coefficients: Array) -> tuple[float, float]:
    """Scale and power: the line of least squares between the logarithms of sums and times."""
    sums = np.log([net.features @ coefficients for net in nets])
    power, logarithm = np.polyfit(sums, np.log([net.value for net in nets]), 1)
    return float(np.exp(logarithm)), float(power)


def _all_but_one(nets: Sequence[Evidence]) -> Iterator[list[Evidence]]:
    return ([*nets[:i], *nets[i + 1 :]] for i in range(len(nets)))


def _check_conditions(records: Sequence[LatencyRecord]) -> None:
    conditions: set[tuple[str, ...]] = {record.conditions for record in records}
    if len(conditions) > 1:
        problem = f"records of different conditions: {_difference(conditions)}"
        raise InputError("block table", problem, "keep each device's records apart")


def _difference(conditions: set[tuple[str, ...]]) -> str:
    one, other = sorted(conditions)[:2]
    return next(f"{a} and {b}" for a, b in zip(one, other, strict=True) if a != b)
