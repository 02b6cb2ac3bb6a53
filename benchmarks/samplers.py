"""Benchmark of samplers: fraction of the best known front's hypervolume after tens of trials.

The space is the quick start's. Quality and latency are synthetic formulas that resemble the real ones (loss falls with
capacity, at a different rate for each knob, with interactions and with 0.43 % noise, which is the share of the spread
that two seeds of the quick start have; latency rises with work and with the number of operations), so that ten seeds of
every sampler take minutes instead of days. Hypervolume is computed from the logarithms of the noiseless objectives,
relative to the front of all points found by any sampler and 3000 random points. The sampler ehvi is told costs that are
exact, and latency too unless `--measured` is given; then it learns it from the trials. Loss is a formula of capacity
here, which flatters a model that knows the costs: `ehvi:features=false` does not use them for quality.

A sampler is written ``name[@runs][/workers][:options]``: ``ehvi@1`` trains each candidate once, where the others' loss
is the mean of two runs; ``ehvi/4`` is asked while three earlier candidates have no result yet.

    python benchmarks/samplers.py --samplers ehvi ehvi:features=false ehvi/4 ehvi@1 ehvi@1:features=false gp tpe random
    python benchmarks/samplers.py --samplers ehvi gp --trials 24 50 --limit 3.5

The results are in reports/results/samplers.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from archsearch.samplers.screening import Screening
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from archsearch.stats import pareto
from archsearch.stats.regression import Array
from archsearch.studies.config.study import SamplerConfig
from archsearch.studies.search.samplers import ObservedTrial, distributions, suggest
from snapgen.architecture.schema import Architecture
from snapgen.seeding import derive_seed

OBJECTIVES = ("validation_loss", "latency_ms")


@dataclass(frozen=True)
class Landscape:
    """Synthetic objectives: `work` of a site represents its MACs, `operations` its kernels."""

    space: Space
    noise: float = 0.0043
    """Of the loss, relative to it, if it is the mean of two runs."""
    measured: bool = False
    """Whether latency is known only once a point was tried."""

    def values(self, point: Mapping[str, int]) -> tuple[float, float]:
        """Loss and latency in milliseconds, without noise."""
        arch = self.space.architecture(point)
        works, operations, attention = zip(*(self._site(arch, *site) for site in arch.named_levels()), strict=True)
        capacity = sum(math.sqrt(w) for w in works)
        loss = 0.35 + 1.6 * capacity**-0.45 * (1 - 0.03 * sum(attention[:3]) ** 0.5)
        loss *= 1 - 0.012 * arch.qk_norm - 0.015 * (arch.rope and sum(attention) > 0)
        return loss, 0.25 + 0.012 * sum(operations) + sum(works) / 9e4

    def known(self, point: Mapping[str, int]) -> dict[str, float] | None:
        """What is known of a point before it is tried."""
        if not self.space.valid(point):
            return None
        arch = self.space.architecture(point)
        sites = [(path, *self._site(arch, path, *rest)) for path, *rest in arch.named_levels()]
        levels = [len(arch.down) - 1 if path == "mid" else int(path[path.index("[") + 1 : -1]) for path, *_ in sites]
        numbers = {
            "macs": sum(work for _, work, *_ in sites),
            "params": sum(work * 4.0**level for (_, work, *_), level in zip(sites, levels, strict=True)),
            "operations": 1 + sum(operations for _, _, operations, _ in sites),
        }
        return numbers if self.measured else {**numbers, "latency_ms": self.values(point)[1]}

    def noise_of(self, runs: int) -> float:
        """Noise of the mean of some runs."""
        return self.noise * math.sqrt(2 / runs)

    def seen(self, point: Mapping[str, int], seed: int, runs: int) -> tuple[float, float]:
        """Objectives as observed by a study: the loss has noise that depends only on the point."""
        loss, ms = self.values(point)
        rng = random.Random(derive_seed(seed, "noise", json.dumps(dict(sorted(point.items())))))
        return loss * (1 + rng.gauss(0, self.noise_of(runs))), ms

    def _site(self, arch: Architecture, path: str, blocks: object, channels: int) -> tuple[float, float, float]:
        b = arch.mid if path == "mid" else blocks
        level = len(arch.down) - 1 if path == "mid" else int(path[path.index("[") + 1 : -1])
        area = 0.25**level
        plain = b.conv == "standard"  # type: ignore[attr-defined]
        conv = 18.0 if plain else 2 * b.expansion + 1.0  # type: ignore[attr-defined]
        n = b.num_transformers * b.transformer_depth  # type: ignore[attr-defined]
        kv = 1.0 if b.num_kv_heads is None else b.num_kv_heads * b.head_dim / channels  # type: ignore[attr-defined]
        block = 3 * b.ffn_ratio + (2 + 2 * kv) * (b.self_attention + b.cross_attention)  # type: ignore[attr-defined]
        work = area * channels**2 * (b.num_res_blocks * conv + n * block)  # type: ignore[attr-defined]
        kernels = b.num_res_blocks * (6 if plain else 10) + n * (8 + 9 * b.self_attention)  # type: ignore[attr-defined]
        return work + 1.0, float(kernels), float(n * b.self_attention)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Entry:
    """A sampler of the benchmark, as ``name[@runs][/workers][:options]`` says."""

    settings: SamplerConfig
    runs: int = 2
    workers: int = 1

    @classmethod
    def parse(cls, label: str) -> Entry:
        """The entry of a label."""
        head, _, text = label.partition(":")
        options = {key: json.loads(value) for key, value in (item.split("=") for item in text.split(",") if item)}
        head, _, workers = head.partition("/")
        name, _, runs = head.partition("@")
        settings = SamplerConfig.model_validate({"name": name, "options": options})
        return cls(settings, int(runs or cls.runs), int(workers or cls.workers))


def run(entry: Entry, landscape: Landscape, *, trials: int, seed: int, limit: float | None) -> list[ObservedTrial]:
    """Candidates of a study, each architecture once; those over the latency limit do not count as ``trials``."""
    space = landscape.space
    screening = Screening(landscape.known)
    knowledge = {
        "known": landscape.known,
        "objectives": (None, "latency_ms"),
        "limits": {} if limit is None else {"latency_ms": limit},
        "screening": screening,
        "identity": lambda p: space.architecture(p).id if space.valid(p) else None,
        "noise": landscape.noise_of(entry.runs),
    }
    first, choices = list(space.reference_points().values()), distributions(landscape.space.knobs)
    past: list[ObservedTrial] = []
    known: set[str] = set()
    while sum((p.excess or 0) <= 0 for p in past) < trials and len(past) < 4 * trials:
        slot = len(past)
        pending = max(0, slot - entry.workers + 1)
        told = [*past[:pending], *(replace(p, values=(), running=True) for p in past[pending:])]
        for attempt in range(4):
            fixed = first[slot] if slot < len(first) and attempt == 0 else None
            fixed = space.sample(random.Random(derive_seed(seed, slot))) if attempt == 3 else fixed
            point, attrs = suggest(
                entry.settings,
                told,
                choices,
                objectives=OBJECTIVES,
                seed=seed,
                slot=slot,
                attempt=attempt,
                fixed=fixed,
                known=knowledge,
            )
            if space.valid(point) and space.architecture(point).id not in known:
                break
        known.add(space.architecture(point).id)
        loss, ms = landscape.seen(point, seed, entry.runs)
        excess = None if limit is None else ms / limit - 1
        past.append(ObservedTrial(slot, point, (loss if (excess or 0) <= 0 else None, ms), excess, sampler_attrs=attrs))
    return past


def main() -> None:
    """Print a row per sampler: median (quartiles) of the hypervolume fraction, and seconds per ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=["ehvi", "gp", "tpe", "nsga2", "qmc", "random"],
        help="name[@runs][/workers][:options]",
    )
    parser.add_argument("--trials", nargs="+", type=int, default=[12, 24, 50])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=None, help="most milliseconds of a candidate")
    parser.add_argument("--space", default="emoji")
    parser.add_argument("--noise", type=float, default=Landscape.noise, help="of the loss, relative")
    parser.add_argument("--level", type=float, help="share to count trials to, instead of gp's after the last trial")
    parser.add_argument("--measured", action="store_true", help="latency is known only once a point was tried")
    arguments = parser.parse_args()

    landscape = Landscape(load_space(arguments.space), arguments.noise, arguments.measured)
    found: dict[str, list[list[tuple[float, float]]]] = {}
    took: dict[str, float] = {}
    for label in arguments.samplers:
        entry, began, asks = Entry.parse(label), time.process_time(), 0
        for seed in range(arguments.seeds):
            past = run(entry, landscape, trials=max(arguments.trials), seed=seed, limit=arguments.limit)
            feasible = [p for p in past if (p.excess or 0) <= 0]
            found.setdefault(label, []).append([landscape.values(p.point) for p in feasible])
            asks += len(past)
        took[label] = (time.process_time() - began) / asks
    show(landscape, found, took, arguments.trials, limit=arguments.limit, level=arguments.level)


def area(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """Hypervolume of the logarithms of two objectives."""
    logarithms = [(math.log(a), math.log(b)) for a, b in points]
    return pareto.hypervolume(pareto.front(logarithms), (math.log(worst[0]), math.log(worst[1])))


def show(
    landscape: Landscape,
    found: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    took: Mapping[str, float],
    budgets: Sequence[int],
    *,
    limit: float | None,
    level: float | None,
) -> None:
    """The table, as Markdown."""
    rng = random.Random(0)
    scattered = [landscape.values(landscape.space.sample(rng)) for _ in range(3000)]
    every = [v for runs in found.values() for run in runs for v in run] + scattered
    every = [v for v in every if limit is None or v[1] <= limit]
    worst = max(v[0] for v in every), max(v[1] for v in every)
    most = area(every, worst)
    shares = {
        label: np.array([[area(run[:n], worst) / most for n in range(1, max(budgets) + 1)] for run in runs])
        for label, runs in found.items()
    }
    target, name = level, f"{level}"
    if target is None and "gp" in shares:
        target, name = float(np.median(shares["gp"][:, -1])), f"gp at {max(budgets)}"
    columns = [f"{n} trials" for n in budgets]
    columns += [f"trials to {name}", "runs to 95 % of it"] if target is not None else []
    print("| sampler |", " | ".join(columns), "| s an ask |")
    print("|---|" + "---|" * (len(columns) + 1))
    for label, by_trial in shares.items():
        cells = []
        for n in budgets:
            low, middle, high = np.quantile(by_trial[:, n - 1], [0.25, 0.5, 0.75])
            cells.append(f"{middle:.3f} ({low:.3f}–{high:.3f})")
        if target is not None:
            cells.append(first(by_trial, target, 1))
            cells.append(first(by_trial, 0.95 * target, Entry.parse(label).runs))
        print(f"| {label} | {' | '.join(cells)} | {took[label]:.2f} |", flush=True)


def first(by_trial: Array, target: float, unit: int) -> str:
    """Median number of trials, times a unit, after which a share is reached; more than all where it is not."""
    reached = [int(np.argmax(row >= target)) + 1 if row.max() >= target else math.inf for row in by_trial]
    middle = float(np.median(reached))
    return f"{unit * middle:g}" if math.isfinite(middle) else "–"


if __name__ == "__main__":
    main()
