"""A table of made-up runs with known effects, over the shipped factorial."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.score import Cost, Curve
from archsearch.spaces.loading import load_space, with_proxy
from archsearch.spaces.space import Space
from archsearch.studies.tabular.table import BenchmarkTable, Entry, Run, TableHeader
from snapgen.seeding import derive_seed
from tests.archsearch.studies.quick import quick_cost, quick_latency
from tests.records import latency_record

EFFECTS: dict[tuple[str, int], float] = {
    ("levels[0:2].self_attention", 1): 0.007,
    ("convs", 1): 0.039,
    ("convs", 2): 0.022,
    ("all.ffn_ratio", 0): 0.001,
    ("all.num_kv_heads", 0): 0.005,
    ("first stage", 1): -0.013,
    ("QK-norm and RoPE", 1): -0.004,
    ("depth", 1): -0.006,
    ("width", 1): -0.02,
}
"""Effect of each choice on the validation loss, against the base's choice."""

INTERACTION = 0.01
"""Further effect of separable convolutions in a wider net."""

NOISE = 0.002
BASE_LOSS = 1.36
PROFILES = ("iphone-15-pro", "iphone-16-pro-max")
MORE, LONG, LARGER, WEIGHTS = 24, 64, 32, 10
"""Architectures with more seeds, with a long run, with a run at 64 px, and with seeds that change the weights alone."""


def true_loss(point: Mapping[str, int]) -> float:
    loss = BASE_LOSS + sum(EFFECTS.get((name, choice), 0.0) for name, choice in point.items())
    return loss + INTERACTION * (point["convs"] == 1) * (point["width"] == 1)


def resolved(**fields: Any) -> ResolvedProtocol:
    return ResolvedProtocol(
        protocol=EvaluationProtocol(**fields),
        data_digest="d",
        autoencoder_digest="a",
        text_encoder_digest="t",
        feature_extractor_digest="e",
    )


@cache
def entries() -> tuple[Space, Space, dict[str, Entry]]:
    """The space, that of the full-size twins, and the architectures with made-up costs."""
    space = load_space("emoji-factorial")
    large = with_proxy(load_space("snapgen-factorial"), space)
    found = {}
    for point in space.distinct_points():
        arch, twin = space.architecture(point), large.architecture(point)
        ms, macs = quick_latency(arch), quick_cost(twin).macs
        found[arch.id] = Entry(
            arch.id,
            point,
            quick_cost(arch),
            (0.98 * ms, ms, 1.03 * ms),
            Cost(params=quick_cost(twin).params, macs=macs, activation_bytes=quick_cost(twin).activation_bytes),
            {name: factor * macs / 1e8 for name, factor in zip(PROFILES, (1.0, 0.8), strict=True)},
        )
    return space, large, found


def make(*, noise: float = NOISE, early: float = 16, seed: int = 0) -> BenchmarkTable:
    """The table. Noise of the loss falls along a run, from ``early`` times that of its end."""
    space, large, found = entries()
    short, more = resolved(), resolved(train_seeds=(2, 3, 4))
    long = resolved(steps=2400, train_seeds=(2,), num_samples=1024, retrieval=True)
    larger = resolved(resolution=64, train_seeds=(2,))
    weights = resolved(train_seeds=(0, 1, 2, 3), varied="weights")
    ids = list(found)
    some = random.Random(seed).sample(ids, LONG)
    runs = [_run(found[i], short, s, noise, early, seed) for i in ids for s in (0, 1)]
    runs += [_run(found[i], more, s, noise, early, seed) for i in some[:MORE] for s in (2, 3, 4)]
    runs += [_run(found[i], long, 2, noise, early, seed) for i in some]
    runs += [_run(found[i], larger, 2, noise, early, seed) for i in some[:LARGER]]
    runs += [_run(found[i], weights, s, noise / 2, early, seed) for i in some[:WEIGHTS] for s in range(4)]
    header = TableHeader(
        space=space.to_dict(),
        full_size=large.to_dict(),
        profiles=PROFILES,
        protocols={p.hash: p for p in (short, more, long, larger, weights)},
        num_runs=len(runs),
        run_seconds="timed",
        curve_points=8,
        extractor="efficientnet-lite0",
        latency_device="host",
        latency=latency_record(1.0),
    )
    return BenchmarkTable("synthetic", header, space, found, tuple(runs))


def _run(entry: Entry, protocol: ResolvedProtocol, seed: int, noise: float, early: float, table_seed: int) -> Run:
    rng = random.Random(derive_seed(table_seed, entry.id, protocol.hash, seed))
    common = random.Random(derive_seed(table_seed, "seed", seed)).gauss(0, 0.01)  # of the seed, on all architectures
    final = true_loss(entry.point) + common + rng.gauss(0, noise)
    # Early in a run the loss is higher and says less of the architecture.
    losses = [final * (1 + 0.5 / k - 0.5 / 8) + rng.gauss(0, early * noise * (8 - k) / 8) for k in range(1, 9)]
    scores = {
        "validation_loss": final,
        "frechet_distance": 2400 + 4000 * (final - BASE_LOSS) + rng.gauss(0, 10),
        "frechet_error": 10.0,
        "kernel_distance": math.exp(final),
        "kernel_error": 0.01,
    }
    if protocol.protocol.retrieval:
        scores |= {"retrieval_mrr": 0.5 - (final - BASE_LOSS), "retrieval_error": 0.01}
    return Run(
        architecture_id=entry.id,
        protocol_hash=protocol.hash,
        seed=seed,
        seconds=10 + entry.cost.macs / 1e6,
        diverged=False,
        scores=scores,
        curve=Curve(
            steps=tuple(range(1, 9)),
            validation_loss=tuple(losses),
            by_timestep=tuple(tuple(loss * f for f in (0.5, 0.8, 1.2, 1.5)) for loss in losses),
        ),
    )
