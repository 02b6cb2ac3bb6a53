"""Fill a table of blocks from times of whole nets (arXiv 2306.00980, 3.2).

A backend times whole nets alone, so the blocks' shares are solved for: the net is timed as it is, without any block,
without each place's blocks, and with more copies of each, and the table's model is fitted to that, no part of it
negative (`archsearch.stats.regression`).

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
from typing import Literal

import numpy as np

from archsearch.block_latency.config import BlockTableConfig
from archsearch.block_latency.table import (
    TOLERATED,
    BlockCost,
    BlockTable,
    Correction,
    NetTiming,
    PredictionErrors,
    condition_mismatch,
    features,
    with_block_counts,
)
from archsearch.latency.base import Backend
from archsearch.latency.repeats import TRIES, measure_round_robin
from archsearch.score import LatencyRecord
from archsearch.stats.regression import Array, NormalPrior, Observation, fit, weak_prior
from snapgen import seeding
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef, BlockSite
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

FEWEST = 4
"""Sub-networks under which nothing is corrected by them."""

LEAST_KEPT = 0.25
"""A random sub-network keeps each block with a probability between this and one."""
COPYING = 0.25
"""And every other sub-network has a copy of a block that it keeps with this probability."""


def fit_block_table(
    backend: Backend,
    arch: Architecture,
    latent_size: int,
    context_tokens: int,
    options: BlockTableConfig | None = None,
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
    options = options or BlockTableConfig()
    arch.check_latent(latent_size)
    plan = list(_planned(arch, options))
    records = {net.id: list((known or {}).get(net.id, ())) for _, _, net in plan}

    def kept(net: Architecture, record: LatencyRecord) -> None:
        _check_conditions([record, *itertools.chain(*records.values())])
        keep(net, record)

    _check_conditions(list(itertools.chain(*records.values())))
    for done in measure_round_robin(
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
    places = list(block_index.block_counts(arch))
    measured = [
        NetTiming(
            what=what,
            use=use,
            architecture_id=net.id,
            counts=tuple(block_index.block_counts(net).get(place, 0) for place in places),
            records=tuple(records[net.id]),
        )
        for what, use, net in plan
    ]
    return _solved(arch, places, measured, settings=options, latent_size=latent_size, context_tokens=context_tokens)


Planned = tuple[str, Literal["fill", "check"], Architecture]


def _planned(arch: Architecture, options: BlockTableConfig) -> Iterator[Planned]:
    """Every net to be timed: in words, what for, and itself; the whole net is the first, and none is there twice."""
    whole = block_index.block_counts(arch)
    if not whole:
        raise InputError("architecture", "has no block", "give it a residual block or a transformer")
    found: list[Planned] = [("the whole net", "fill", arch), ("without any block", "fill", with_block_counts(arch, {}))]
    for place, count in whole.items():
        label = BlockRef("", place[2], place[0], place[1], 0).label
        more = {**whole, place: count + options.copies}
        found.append((f"without {label}", "fill", with_block_counts(arch, {**whole, place: 0})))
        found.append((f"{options.copies} more of {label}", "fill", with_block_counts(arch, more)))
    unique = {net.id: (what, use, net) for what, use, net in reversed(found)}
    yield from reversed(unique.values())
    yield from _drawn(arch, options, set(unique))


def _drawn(arch: Architecture, options: BlockTableConfig, taken: set[str]) -> Iterator[Planned]:
    """Random sub-networks, each of a seed of its own: more of them begin with the same ones."""
    drawn = 0
    for attempt in range(options.check * TRIES):
        if drawn == options.check:
            return
        rng = random.Random(seeding.derive_seed(options.seed, arch.id, "sub-networks", attempt))
        keep, copy = rng.uniform(LEAST_KEPT, 1), rng.choice((0.0, COPYING))
        counts: Counter[BlockSite] = Counter()
        for block in block_index.blocks(arch):
            kept, copied = rng.random() < keep, rng.random() < copy
            counts[block.place] += kept + (kept and copied)
        net = with_block_counts(arch, counts)
        if net.id not in taken:
            taken.add(net.id)
            drawn += 1
            yield f"sub-network {drawn}", "check", net
    if drawn < options.check:
        problem = f"has {drawn} sub-networks beside those that the table is filled from, fewer than {options.check}"
        raise InputError("architecture", problem, "check fewer")


def _solved(
    arch: Architecture,
    places: Sequence[BlockSite],
    measured: Sequence[NetTiming],
    *,
    settings: BlockTableConfig,
    latent_size: int,
    context_tokens: int,
) -> BlockTable:
    filling = [_evidence(net) for net in measured if net.use == "fill"]
    checking = [_evidence(net) for net in measured if net.use == "check"]
    prior = weak_prior(np.array([e.features for e in filling]), np.array([e.value for e in filling]))
    found, scale, power = fit(filling, prior), 1.0, 1.0
    before = PredictionErrors(errors=tuple(e.ratio(found.coefficients) - 1 for e in checking)) if checking else None
    tried: dict[Correction, PredictionErrors] = {}
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
            BlockCost(site=site, layer=layer, kind=kind, ms=ms, copy_ms=copy_ms)
            for (site, layer, kind), ms, copy_ms in zip(places, costs[::2], costs[1::2], strict=True)
        ),
        scale=scale,
        power=power,
        before=before,
        tried=tried,
        correction=correction,
        measured=tuple(measured),
    )


def _evidence(net: NetTiming) -> Observation:
    return Observation(features(net.counts), net.ms, net.tolerance)


def _refitted(filling: Sequence[Observation], checking: Sequence[Observation], prior: NormalPrior) -> PredictionErrors:
    """Errors of sums that are fitted to all nets but the one foretold."""
    fits = [fit([*filling, *others], prior).coefficients for others in _all_but_one(checking)]
    return PredictionErrors(errors=tuple(e.ratio(found) - 1 for e, found in zip(checking, fits, strict=True)))


def _curved(checking: Sequence[Observation], coefficients: Array) -> PredictionErrors:
    """Errors of powers of the sum that are fitted to all sub-networks but the one foretold."""
    curves = [_curve(others, coefficients) for others in _all_but_one(checking)]
    sums = [float(e.features @ coefficients) for e in checking]
    times = [scale * total**power for total, (scale, power) in zip(sums, curves, strict=True)]
    return PredictionErrors(errors=tuple(ms / e.value - 1 for ms, e in zip(times, checking, strict=True)))


def _curve(nets: Sequence[Observation], coefficients: Array) -> tuple[float, float]:
    """Scale and power: the line of least squares between the logarithms of sums and times."""
    sums = np.log([net.features @ coefficients for net in nets])
    power, logarithm = np.polyfit(sums, np.log([net.value for net in nets]), 1)
    return float(np.exp(logarithm)), float(power)


def _all_but_one(nets: Sequence[Observation]) -> Iterator[list[Observation]]:
    return ([*nets[:i], *nets[i + 1 :]] for i in range(len(nets)))


def _check_conditions(records: Sequence[LatencyRecord]) -> None:
    conditions: set[tuple[str, ...]] = {record.conditions for record in records}
    if len(conditions) > 1:
        problem = f"records of different conditions: {condition_mismatch(conditions)}"
        raise InputError("block table", problem, "keep each device's records apart")
