"""Which score ranks as longer runs do, or runs on larger images, and from which point of a short run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archsearch.protocol import ResolvedProtocol
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import CONFIDENCE
from archsearch.stats.rank_correlation import rank_correlation, spearman
from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable, Run, mean_scores
from snapgen.seeding import derive_seed

AS_IS = "as is"
RANGE_OF = "validation_loss t"
"""Beginning of the name of the loss of a range of timesteps, which its number follows."""
SAMPLES = 400
"""Random samples of architectures by which the error of a sample is measured."""
BASELINES = ("params", "macs", "latency_ms")
"""Numbers that need no training; the larger candidate is expected to be the better one."""


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a score of the short runs with a score of other ones.

    Attributes:
        score: ``validation_loss``, ``validation_loss t1`` (its lowest timesteps), …, a distance, or a cost.
        budget: share of the short run's steps after which the score was taken; 0 for costs.
        reference: what the other runs have more of, e.g. ``2,400 steps`` or ``64 px``.
        target: score of the other runs.
        kind: ``as is``, or what is controlled for.
        rho: the correlation, positive where the score ranks as the target does; None if it is undefined.
        ceiling: what noise leaves: the correlation of the score's mean over its seeds, in these architectures, with its
            mean over endless ones; None for costs, which have no noise.
    """

    score: str
    budget: float
    reference: str
    target: str
    kind: str
    n: int
    rho: Estimate | None
    ceiling: float | None


def is_of_a_range(score: str) -> bool:
    """Whether a score is the loss of a range of timesteps."""
    return score.startswith(RANGE_OF)


def agreements(table: BenchmarkTable) -> list[Agreement]:
    """Agreement of every score at every point of the curve with every score of longer runs, and of larger images."""
    side, longer = table.protocol.protocol.resolution, _longer(table)
    larger = table.protocol_where(resolution=lambda other: other > side)
    rows = [] if longer is None else _agreements(table, longer, f"{longer.protocol.steps:,} steps")
    return rows if larger is None else [*rows, *_agreements(table, larger, f"{larger.protocol.resolution} px")]


def ceilings(table: BenchmarkTable) -> dict[tuple[str, float], tuple[int, float | None]]:
    """How far noise lets each score of the short runs rank, by score and budget: number of architectures, and the
    correlation of its mean over the table's seeds with its mean over endless ones; None if it is undefined."""
    runs = [[by_seed[seed] for seed in table.seeds] for by_seed in table.short_runs.values()]
    stable = [group for group in runs if not any(run.diverged for run in group)]
    return {key: (len(stable), _ceiling(by_seed)) for key, (_, by_seed) in _scores(stable).items()}


@dataclass(frozen=True)
class SampleError:
    """How far the agreement in some architectures lies from that in all, where the latter is known.

    That is the agreement of a score of the first seed's runs with the end score of the second seed's.

    Attributes:
        target: end score of the second seed's runs.
        sampled: number of architectures in a sample.
        rho: rank correlation over all architectures.
        spread: distance from it within which 95 % of random samples lie.
        chosen: distance from it of the architectures that have longer runs.
    """

    score: str
    budget: float
    target: str
    sampled: int
    rho: float
    spread: float
    chosen: float


def sample_errors(table: BenchmarkTable) -> list[SampleError]:
    """Errors of samples of as many architectures as have longer runs; empty without these, or with a single seed."""
    longer = _longer(table)
    if longer is None or len(table.seeds) < 2:
        return []
    first, second = table.seeds[:2]
    stable = [i for i, runs in table.short_runs.items() if not any(run.diverged for run in runs.values())]
    chosen = [stable.index(i) for i in table.runs_like(longer) if i in stable]
    rng = np.random.default_rng(derive_seed(0, "samples"))
    samples = np.array([rng.choice(len(stable), len(chosen), replace=False) for _ in range(SAMPLES)])
    scores = _scores([[table.short_runs[i][first]] for i in stable])
    targets = _scores([[table.short_runs[i][second]] for i in stable])
    found = []
    for (score, budget), (values, _) in scores.items():
        for (target, share), (wanted, _) in targets.items():
            if share < 1 or is_of_a_range(target) or is_of_a_range(score):
                continue
            pair = np.array([values, wanted])
            rho = float(rank_correlation(pair))
            spread = float(np.quantile(np.abs(rank_correlation(pair[:, samples]) - rho), CONFIDENCE))
            error = float(rank_correlation(pair[:, chosen])) - rho
            found.append(SampleError(score, budget, target, len(chosen), rho, spread, error))
    return found


def _longer(table: BenchmarkTable) -> ResolvedProtocol | None:
    """The protocol of longer runs on the same images."""
    own = table.protocol.protocol
    return table.protocol_where(steps=lambda steps: steps > own.steps, resolution=lambda side: side == own.resolution)


def _agreements(table: BenchmarkTable, other: ResolvedProtocol, reference: str) -> list[Agreement]:
    """Agreement with the scores of the runs under another protocol."""
    short, pairs = table.short_runs, table.runs_like(other)
    ids = [i for i in pairs if i in short and not any(run.diverged for run in (*short[i].values(), *pairs[i].values()))]
    entries = [table.entries[i] for i in ids]
    controls = {
        AS_IS: None,
        "at equal latency": [e.number("latency_ms") for e in entries],
        "at equal MACs": [e.number("macs") for e in entries],
    }
    other_scores = [mean_scores([*pairs[i].values()]) for i in ids]
    targets = [name for name in LOWER_IS_BETTER if ids and all(name in scores for scores in other_scores)]
    first_runs = [[short[i][seed] for seed in table.seeds] for i in ids]
    scores = [(*key, values, _ceiling(per_seed)) for key, (values, per_seed) in _scores(first_runs).items()]
    scores += [(name, 0.0, [-e.number(name) for e in entries], None) for name in BASELINES]
    rows = []
    for target in targets:
        sign = 1 if LOWER_IS_BETTER[target] else -1
        wanted = [sign * found[target] for found in other_scores]
        for score, budget, values, ceiling in scores:
            for kind, control in controls.items():
                rho = spearman(values, wanted, control)
                rows.append(Agreement(score, budget, reference, target, kind, len(ids), rho, ceiling))
    return rows


Scores = dict[tuple[str, float], tuple[list[float], list[list[float]]]]
"""By score and budget: its mean over seeds for each architecture, and its values by seed."""


def _scores(runs: Sequence[Sequence[Run]]) -> Scores:
    """All scores that all runs have; lower is better.

    Args:
        runs: of each architecture, a run per seed.
    """
    every = [run for group in runs for run in group]
    points = min((len(run.curve.validation_loss) for run in every), default=0)
    found: Scores = {}

    def add(score: str, budget: float, by_seed: list[list[float]]) -> None:
        found[score, budget] = [sum(values) / len(values) for values in by_seed], by_seed

    for i in range(points):
        budget = (i + 1) / points
        add("validation_loss", budget, [[run.curve.validation_loss[i] for run in group] for group in runs])
        for part in range(min(len(run.curve.by_timestep[i]) for run in every)):
            parts = [[run.curve.by_timestep[i][part] for run in group] for group in runs]
            add(f"{RANGE_OF}{part + 1}", budget, parts)
    for name in LOWER_IS_BETTER:
        if every and all(name in run.scores for run in every) and (name != "validation_loss" or not points):
            sign = 1 if LOWER_IS_BETTER[name] else -1
            add(name, 1.0, [[sign * run.scores[name] for run in group] for group in runs])
    return found


def _ceiling(by_seed: Sequence[Sequence[float]]) -> float | None:
    """Correlation of a score's mean over seeds with its mean over endless ones.

    That is √R for the reliability R of the mean of S seeds, R = S r / (1 + (S − 1) r) (Spearman and Brown), where r is
    the mean rank correlation of two seeds. None if it is undefined.
    """
    seeds = min((len(values) for values in by_seed), default=0)
    columns = [[values[s] for values in by_seed] for s in range(seeds)]
    pairs = [spearman(a, b) for i, a in enumerate(columns) for b in columns[:i]]
    if not pairs or any(pair is None for pair in pairs):
        return None
    r = sum(pair.value for pair in pairs if pair is not None) / len(pairs)
    return math.sqrt(seeds * r / (1 + (seeds - 1) * r)) if r > 0 else 0.0


def best_budget(rows: Sequence[Agreement], score: str, *, within: float = 0.02) -> float | None:
    """The smallest budget at which a score ranks about as well as at any; None if it was not compared.

    Args:
        rows: of one reference and target.
        within: difference from the best correlation that is allowed.
    """
    known = [r for r in rows if (r.score, r.kind) == (score, AS_IS) and r.rho is not None]
    if not known:
        return None
    best = max(r.rho.value for r in known if r.rho is not None)
    return min(r.budget for r in known if r.rho is not None and r.rho.value >= best - within)
