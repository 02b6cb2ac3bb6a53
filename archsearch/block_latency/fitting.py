"""Fitting of block latency tables to the latencies of whole nets (arXiv 2306.00980, section 3.2).

A backend can only measure whole nets, so the latencies of blocks are inferred: the net is measured unchanged, without
any block, without the blocks of each site, and with additional copies of each, and a non-negative linear model is
fitted to these latencies (`archsearch.stats.regression`).

The predictions are validated on random sub-networks that are not part of the fit. If the error for any of them exceeds
`TOLERATED`, a refit that includes the sub-networks is evaluated by leave-one-out on them, and kept if it is better.
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
    NetTiming,
    PredictionErrors,
    features,
    with_block_counts,
)
from archsearch.latency.base import Backend
from archsearch.latency.records import condition_mismatch
from archsearch.latency.repeats import TRIES, measure_round_robin
from archsearch.score import LatencyRecord
from archsearch.stats.regression import NormalPrior, Observation, fit, weak_prior
from snapgen import seeding
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef, BlockSite
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback, ignore_progress

MIN_VALIDATION_NETS = 4
"""Fewest sub-networks for which a refit is tried."""

MIN_KEEP_PROB = 0.25
"""Smallest probability with which a random sub-network keeps a block; it is drawn for each, up to 1."""

COPY_PROB = 0.25
"""Probability with which a kept block is duplicated, in about half of the sub-networks."""


def fit_block_table(
    backend: Backend,
    arch: Architecture,
    latent_size: int,
    context_tokens: int,
    options: BlockTableConfig | None = None,
    *,
    existing: Mapping[str, Sequence[LatencyRecord]] | None = None,
    save: Callable[[Architecture, LatencyRecord], None] = lambda *_: None,
    progress: ProgressCallback = ignore_progress,
) -> BlockTable:
    """Measure a net and its sub-networks in rounds, and fit the table of its block latencies.

    Args:
        backend: measures whole nets.
        arch: the net.
        latent_size: height and width of the latent.
        context_tokens: length of the context.
        options: number of copies, validation nets and repeats.
        existing: existing records by architecture id, which count as measurements.
        save: called with each new record, so that an interrupted measurement can be resumed.
        progress: called after each measurement.

    Raises:
        InputError: if the net has no block, does not support the latent size, has too few sub-networks for validation,
            or the conditions of the records differ.
        MeasurementError, DeviceLostError: raised by the backend.
    """
    options = options or BlockTableConfig()
    arch.validate_latent_size(latent_size)
    plan = list(_planned_nets(arch, options))
    records = {net.id: list((existing or {}).get(net.id, ())) for _, _, net in plan}

    def check_and_save(net: Architecture, record: LatencyRecord) -> None:
        _check_conditions([record, *itertools.chain(*records.values())])
        save(net, record)

    _check_conditions(list(itertools.chain(*records.values())))
    measure_round_robin(
        lambda net: backend.measure(net, latent_size, context_tokens),
        [net for _, _, net in plan],
        records,
        save=check_and_save,
        min_repeats=options.min_repeats,
        max_repeats=options.max_repeats,
        progress=progress,
    )
    sites = list(block_index.block_counts(arch))
    measured = [
        NetTiming(
            what=what,
            use=use,
            architecture_id=net.id,
            counts=tuple(block_index.block_counts(net).get(site, 0) for site in sites),
            records=tuple(records[net.id]),
        )
        for what, use, net in plan
    ]
    return _fit_table(arch, sites, measured, settings=options, latent_size=latent_size, context_tokens=context_tokens)


Planned = tuple[str, Literal["fill", "check"], Architecture]


def _planned_nets(arch: Architecture, options: BlockTableConfig) -> Iterator[Planned]:
    """Every net to measure, with a description and its use: the whole net first, without duplicates."""
    full = block_index.block_counts(arch)
    if not full:
        raise InputError("architecture", "has no block", "give it a residual block or a transformer")
    nets: list[Planned] = [("the whole net", "fill", arch), ("without any block", "fill", with_block_counts(arch, {}))]
    for block_site, count in full.items():
        site, layer, kind = block_site
        label = BlockRef("", kind, site, layer, 0).label
        more = {**full, block_site: count + options.extra_copies}
        nets.append((f"without {label}", "fill", with_block_counts(arch, {**full, block_site: 0})))
        nets.append((f"{options.extra_copies} more of {label}", "fill", with_block_counts(arch, more)))
    unique = {net.id: (what, use, net) for what, use, net in reversed(nets)}  # the first of equal nets wins
    yield from reversed(unique.values())
    yield from _validation_nets(arch, options, set(unique))


def _validation_nets(arch: Architecture, options: BlockTableConfig, used: set[str]) -> Iterator[Planned]:
    """Random sub-networks, each with its own seed, so that a larger number starts with the same ones."""
    drawn = 0
    for attempt in range(options.validation_nets * TRIES):
        if drawn == options.validation_nets:
            return
        rng = random.Random(seeding.derive_seed(options.seed, arch.id, "sub-networks", attempt))
        keep_prob, copy_prob = rng.uniform(MIN_KEEP_PROB, 1), rng.choice((0.0, COPY_PROB))
        counts: Counter[BlockSite] = Counter()
        for block in block_index.blocks(arch):
            kept, copied = rng.random() < keep_prob, rng.random() < copy_prob
            counts[block.block_site] += kept + (kept and copied)
        net = with_block_counts(arch, counts)
        if net.id not in used:
            used.add(net.id)
            drawn += 1
            yield f"sub-network {drawn}", "check", net
    if drawn < options.validation_nets:
        problem = f"only {drawn} sub-networks are left for validation, {options.validation_nets} were requested"
        raise InputError("architecture", problem, "lower --validation-nets")


def _fit_table(
    arch: Architecture,
    sites: Sequence[BlockSite],
    measured: Sequence[NetTiming],
    *,
    settings: BlockTableConfig,
    latent_size: int,
    context_tokens: int,
) -> BlockTable:
    fitted = [_observation(net) for net in measured if net.use == "fill"]
    validation = [_observation(net) for net in measured if net.use == "check"]
    prior = weak_prior(np.array([e.features for e in fitted]), np.array([e.value for e in fitted]))
    result = fit(fitted, prior)
    before = after = None
    if validation:
        before = PredictionErrors(errors=tuple(e.ratio(result.coefficients) - 1 for e in validation))
    if before and before.largest > TOLERATED and len(validation) >= MIN_VALIDATION_NETS:
        after = _refit_errors(fitted, validation, prior)
    better = before and after and after.largest < before.largest
    if better:
        result = fit([*fitted, *validation], prior)
    fixed, *costs = result.coefficients.tolist()
    first = measured[0].records[0]
    return BlockTable(
        **first.model_dump(include={"source", "device", "compute_units", "chip", "os", "threads", "runtime"}),
        architecture=arch,
        latent_size=latent_size,
        context_tokens=context_tokens,
        settings=settings,
        fixed_ms=fixed,
        floor_ms=float(np.median(np.sqrt(np.diag(result.covariance)[1:]))),
        costs=tuple(
            BlockCost(site=site, layer=layer, kind=kind, ms=ms, copy_ms=copy_ms)
            for (site, layer, kind), ms, copy_ms in zip(sites, costs[::2], costs[1::2], strict=True)
        ),
        before=before,
        tried={"refit": after} if after else {},
        correction="refit" if better else None,
        measured=tuple(measured),
    )


def _observation(net: NetTiming) -> Observation:
    return Observation(features(net.counts), net.ms, net.tolerance)


def _refit_errors(
    fitted: Sequence[Observation], validation: Sequence[Observation], prior: NormalPrior
) -> PredictionErrors:
    """Leave-one-out errors of the refit on the validation nets."""
    errors = []
    for i, heldout in enumerate(validation):
        refit = fit([*fitted, *validation[:i], *validation[i + 1 :]], prior)
        errors.append(heldout.ratio(refit.coefficients) - 1)
    return PredictionErrors(errors=tuple(errors))


def _check_conditions(records: Sequence[LatencyRecord]) -> None:
    conditions: set[tuple[str, ...]] = {record.conditions for record in records}
    if len(conditions) > 1:
        problem = f"records of different conditions: {condition_mismatch(conditions)}"
        raise InputError("block table", problem, "use a separate file of records for each device")
