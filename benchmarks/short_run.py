"""Benchmark of the quick start's short run: effect of each of its settings.

Trains a few fixed architectures of the `emoji` space under variants of the protocol and prints for each variant the
mean validation loss of the EMA weights, the spread between seeds, and the CPU time of a run (wall-clock time is
unreliable on a shared machine). Uses one thread.

    python benchmarks/short_run.py
    python benchmarks/short_run.py --change optimizer=muon --change learning_rate=4e-3,batch=32 --csv short_run.csv
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch

from archsearch.protocol import EvaluationProtocol
from archsearch.quality.candidate_evaluator import CandidateEvaluator
from archsearch.spaces.loading import load_space
from snapgen import config
from snapgen.architecture.schema import Architecture

# Changes to the space's base, with steps from 0.1 s down to a quarter of that.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "base": {},
    "thin": {"levels[2].channels": "32", "down blocks": "1", "up blocks": "1", "lowest depth": "1"},
    "separable": {"convs": "separable ×2", "levels[0:2].self_attention": "false", "up blocks": "1"},
    "wide": {"levels[0].channels": "32", "levels[1].channels": "48", "up blocks": "1", "lowest depth": "1"},
}


class RunResult(NamedTuple):
    """One run."""

    change: str
    architecture: str
    params: int
    seed: int
    validation_loss: float
    frechet_distance: float | None
    kernel_distance: float | None
    cpu_seconds: float


def architectures(names: list[str]) -> dict[str, Architecture]:
    """The fixed architectures; `snapgen` is the space's reference of that name."""
    space = load_space("emoji")
    points = space.reference_points()
    chosen = {}
    for name in names:
        point = dict(points["base" if name in ARCHITECTURES else name])
        for knob in space.knobs:
            if knob.name in ARCHITECTURES.get(name, {}):
                point[knob.name] = [str(label) for label in knob.choices].index(ARCHITECTURES[name][knob.name])
        chosen[name] = space.architecture(point)
    return chosen


def protocol(change: str, base: dict[str, Any]) -> EvaluationProtocol:
    """The default protocol with ``key=value,key=value`` changed."""
    return config.parse_config({**base, **pairs(change)}, EvaluationProtocol, source="--change")


def pairs(change: str) -> dict[str, Any]:
    """``key=value,key=value`` as a mapping; the settings turn texts into numbers."""
    return {key: value for key, _, value in (pair.partition("=") for pair in filter(None, change.split(",")))}


def run(
    change: str, chosen: dict[str, Architecture], base: dict[str, Any], study_seed: int, out: Path | None
) -> list[RunResult]:
    """Train every architecture with all seeds of a protocol, printing each run."""
    evaluator = CandidateEvaluator(protocol(change, base), torch.device("cpu"))
    rows = []
    for name, arch in chosen.items():
        started = time.process_time()
        artifacts = out / (change or "default") / name if out else None
        quality = evaluator.score(arch, study_seed=study_seed, artifacts=artifacts)
        seconds = (time.process_time() - started) / len(evaluator.protocol.train_seeds)
        params = sum(p.numel() for p in evaluator.net(arch).parameters())
        frechet, kernel = quality.frechet_distance, quality.kernel_distance
        for number, seed in enumerate(evaluator.protocol.train_seeds):
            loss = quality.validation_loss.by_seed[number]
            by_seed = [None if e is None else e.by_seed[number] for e in (frechet, kernel)]
            rows.append(RunResult(change, name, params, seed, loss, by_seed[0], by_seed[1], seconds))
        shown = " ".join(f"{row.validation_loss:.4f}" for row in rows if row.architecture == name)
        print(f"  {name:10} {params / 1e6:5.2f} M  loss {shown}  {seconds:5.1f} s a run", flush=True)
    return rows


def summary(change: str, rows: list[RunResult]) -> str:
    """Mean loss, spread between seeds (pooled over architectures), time."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        losses.setdefault(row.architecture, []).append(row.validation_loss)
    several = all(len(found) > 1 for found in losses.values())
    spread = statistics.fmean(statistics.variance(found) for found in losses.values()) ** 0.5 if several else math.nan
    means = [statistics.fmean(found) for found in losses.values()]
    return (
        f"{change or 'default':50} loss {statistics.fmean(means):.4f}  between seeds ±{spread:.4f}  "
        f"between architectures ±{statistics.pstdev(means):.4f}  {statistics.fmean(r.cpu_seconds for r in rows):.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--change", action="append", default=[], help="key=value,key=value over the default protocol")
    parser.add_argument("--base", default="", help="key=value,key=value changed in every variant")
    parser.add_argument("--architectures", default="base,thin,separable,wide")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--study-seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="append every run to this file")
    parser.add_argument("--out", type=Path, help="folder for samples and curves")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = architectures(given.architectures.split(","))
    base = pairs(given.base) | {"train_seeds": [int(seed) for seed in given.seeds.split(",")]}
    for change in given.change or [""]:
        print(change or "default", flush=True)
        rows = run(change, chosen, base, given.study_seed, given.out)
        print(summary(change, rows), flush=True)
        if given.csv:
            pandas.DataFrame(rows).to_csv(given.csv, mode="a", header=not given.csv.exists(), index=False)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"short_run: {error}")
