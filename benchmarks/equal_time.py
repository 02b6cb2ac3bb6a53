"""Searches of equal time side by side: candidates, hypervolume and front of several runs of each of two or more ways.

    python benchmarks/equal_time.py before=A/runs/quick before=B/runs/quick after=C/runs/quick after=D/runs/quick

Each argument is a way's name and the folder of a run with its study.db. Hypervolumes are shares of the box between the
best and the worst value of any run, in the logarithms of quality and latency. Only candidates whose quality is the mean
of the same number of seeds count (``--seeds``), so that a way that trains some candidates once gains nothing by luck.

The results are in reports/results/equal_time.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import optuna

from archsearch.stats.pareto import Point, bounds, front, hypervolume
from archsearch.studies.search.candidates import eligible, load_candidates, objectives
from archsearch.studies.storage.record import Candidate


def load(folder: Path) -> tuple[list[Candidate], tuple[str, ...]]:
    """The scored candidates of a run, and the names of its objectives."""
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    return eligible(load_candidates(study)), objectives(study)


def points(candidates: list[Candidate], names: tuple[str, ...], seeds: int) -> list[Point]:
    """The candidates with that many seeds, as logarithms of their objectives."""
    return [tuple(math.log(c.value(name)) for name in names) for c in candidates if c.runs == seeds]


def main() -> None:
    """Print a row per run and one per way, then the fronts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="WAY=FOLDER")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds of the candidates that count")
    arguments = parser.parse_args()

    runs = [(way, *load(Path(folder))) for way, folder in (run.split("=", 1) for run in arguments.runs)]
    found = [(way, points(candidates, names, arguments.seeds)) for way, candidates, names in runs]
    best, reference = bounds([point for _, run in found for point in run])
    box = math.prod(w - b for b, w in zip(best, reference, strict=True))
    shares = [hypervolume(run, reference) / box for _, run in found]
    print(f"| way | candidates | training runs | with {arguments.seeds} seeds | hypervolume | front |")
    print("|---|---|---|---|---|---|")
    for (way, candidates, _), (_, run), share in zip(runs, found, shares, strict=True):
        trainings = sum(c.runs for c in candidates)
        print(f"| {way} | {len(candidates)} | {trainings} | {len(run)} | {share:.3f} | {len(front(run))} |")
    for way in dict.fromkeys(way for way, *_ in runs):
        own = [(len(run[1]), share) for run, share in zip(runs, shares, strict=True) if run[0] == way]
        count, share = (statistics.median(column) for column in zip(*own, strict=True))
        print(f"| **{way}, median** | {count:g} | | | {share:.3f} | |")
    for way, run in found:
        shown = ", ".join(f"{math.exp(loss):.3f} at {math.exp(ms):.2f}" for loss, ms in front(run))
        print(f"\n{way}: {shown}")


if __name__ == "__main__":
    main()
