"""The cases of `benchmarks.intervals`: intervals and verdicts on data whose truth is known."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from archsearch.quality import distances, retrieval
from archsearch.spaces.summary import KnobSummary
from archsearch.stats import contrasts, intervals, regression
from archsearch.stats.contrasts import SeedTable
from archsearch.stats.estimate import DistanceEstimate, Estimate
from archsearch.stats.intervals import verdict
from archsearch.stats.main_effects import effects
from archsearch.stats.rank_correlation import interval as rank_interval, rank_correlation
from snapgen.seeding import derive_seed

Rng = np.random.Generator
Array = NDArray[np.float64]
Draw = Callable[[Rng], Sequence[bool]]
"""One draw of the data: for each interval or verdict of it, whether it holds the truth, or is not “cannot tell”."""

DRAWS = 2000
"""Draws of a case, unless it is a slow one."""


@dataclass(frozen=True)
class Case:
    """One condition under which an interval or a verdict is tried.

    Attributes:
        name: the interval or the verdict.
        condition: what the data are like.
        draw: one draw.
        share: of `DRAWS`, how many are made.
        nominal: coverage, or rate of false verdicts, that is claimed.
        excess: by how much the rate is known to be worse, which the page says.
    """

    name: str
    condition: str
    draw: Draw
    share: float = 1.0
    nominal: float = 0.95
    excess: float = 0.0

    def rate(self, draws: int = DRAWS) -> float:
        """How often the intervals hold the truth, or the verdicts are false."""
        rng = np.random.default_rng(derive_seed(0, f"{self.name}: {self.condition}"))
        return float(np.mean([hit for _ in range(max(1, round(self.share * draws))) for hit in self.draw(rng)]))


def holds(estimate: Estimate, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return estimate.low <= truth <= estimate.high


def is_told(difference: Estimate) -> bool:
    """Whether a verdict is taken on a difference."""
    return verdict(difference) != "cannot tell"


def coverage() -> Iterator[Case]:
    """Cases of intervals."""
    for cases in (_of_seeds, _of_samples, _of_tables, _of_ranks, _of_models):
        yield from cases()


def _of_seeds() -> Iterator[Case]:
    def over_seeds(seeds: int, within: float) -> Draw:
        """Seeds of unit variance, and a part of the mean's variance that is known."""

        def draw(rng: Rng) -> list[bool]:
            values = rng.normal(size=seeds) + rng.normal(0, math.sqrt(within))
            return [holds(intervals.mean_over_seeds(values.tolist(), within), 0)]

        return draw

    for seeds in (2, 3):
        for within, text in ((0.0, "nothing else"), (0.05, "a small known part"), (1.0, "a known part as large")):
            yield Case("mean over seeds", f"{seeds} seeds, {text}", over_seeds(seeds, within))

    def distance(seeds: int, spread: float, shared: float) -> Draw:
        """Distances whose sampling errors, of unit variance, have a part that all seeds share."""

        def draw(rng: Rng) -> list[bool]:
            errors = math.sqrt(shared) * rng.normal() + math.sqrt(1 - shared) * rng.normal(size=seeds)
            values = errors + spread * rng.normal(size=seeds)
            return [holds(intervals.distance_estimate([DistanceEstimate(float(v), 1.0) for v in values]), 0)]

        return draw

    name = "Fréchet and kernel distance"
    yield Case(name, "1 seed", distance(1, 0, 1))
    for seeds in (2, 3):
        for shared in (1.0, 0.5):
            for spread in (0.3, 1.0):
                text = (
                    f"{seeds} seeds that spread by {spread:g} of the sampling error, {shared:.0%} of which they share"
                )
                yield Case(name, text, distance(seeds, spread, shared))


def _of_samples() -> Iterator[Case]:
    yield Case("validation loss", "1 seed, for other pairs", lambda rng: _losses(rng, 1))
    for seeds in (2, 3):
        yield Case("validation loss", f"{seeds} seeds, for these pairs", lambda rng, s=seeds: _losses(rng, s))
    for distance, name in ((distances.frechet, "Fréchet distance"), (distances.kernel, "kernel distance")):
        for images, dims, groups in ((256, 16, 8), (48, 64, 32)):
            groups = images if distance is distances.kernel else groups
            yield Case(
                f"{name} of one seed",
                f"{images} images, {dims} features, a jackknife of {groups} groups",
                lambda rng, f=distance, n=images, d=dims: [
                    holds(intervals.distance_estimate([_distance(rng, f, n, d)]), _expected_distance(f, n, d))
                ],
                share=0.15,
            )
    for images, concepts in ((256, 128), (24, 24)):
        yield Case(
            "retrieval MRR",
            f"1 seed, {images} images of {concepts} concepts",
            lambda rng, n=images, c=concepts: _retrieved(rng, n, c),
        )

    for images, rate in ((256, 0.3), (256, 0.05), (64, 0.05)):
        text = f"1 seed, {images} images, {rate:g} of them"
        yield Case("rate of images", text, lambda rng, n=images, p=rate: _rate(rng, n, p), excess=0.02)


def _rate(rng: Rng, images: int, rate: float) -> list[bool]:
    """Images of which each is a hit with that probability, as of copies."""
    return [holds(intervals.rate_estimate(torch.from_numpy(rng.random((1, images)) < rate).double()), rate)]


def _losses(rng: Rng, seeds: int) -> list[bool]:
    """512 pairs of varying difficulty, seeds of a spread as large as that of their interaction with the pairs."""
    difficulty, pairs = rng.gamma(2, 0.5, 512), 512
    noise = 0.1 * rng.normal(size=(seeds, pairs))
    effects_of_seeds = 0.1 / math.sqrt(pairs) * rng.normal(size=(seeds, 1))
    table = torch.from_numpy(difficulty + noise + effects_of_seeds)
    truth = 1.0 if seeds == 1 else float(difficulty.mean())
    return [holds(intervals.validation_estimate(list(table)), truth)]


Distance = Callable[[torch.Tensor, distances.ReferenceStats], DistanceEstimate]


def _distance(rng: Rng, distance: Distance, images: int, dims: int) -> DistanceEstimate:
    """Distance of a Gaussian sample to a Gaussian reference that is wider and shifted."""
    scale = 1 / np.sqrt(1 + np.arange(dims))
    sample = torch.from_numpy(rng.normal(size=(images, dims)) * scale * 0.8 + 0.2 * scale)
    return distance(sample, _reference(dims))


@functools.cache
def _reference(dims: int) -> distances.ReferenceStats:
    scale = 1 / np.sqrt(1 + np.arange(dims))
    features = np.random.default_rng(derive_seed(0, "reference")).normal(size=(256, dims)) * scale
    covariance = torch.diag(torch.from_numpy(scale**2))
    return distances.ReferenceStats(torch.zeros(dims).double(), covariance, torch.from_numpy(features), 0.0)


@functools.cache
def _expected_distance(distance: Distance, images: int, dims: int) -> float:
    """Mean distance of samples of that size: what the intervals are for."""
    rng = np.random.default_rng(derive_seed(0, "truth"))
    return float(np.mean([_distance(rng, distance, images, dims).value for _ in range(300)]))


def _retrieved(rng: Rng, images: int, concepts: int) -> list[bool]:
    """Ranks of concepts of varying difficulty; the truth is the mean over all concepts that there might be."""
    own = torch.arange(images) % concepts
    rate = rng.beta(1, 9, concepts)[own.numpy()]
    ranks = torch.from_numpy(rng.geometric(rate))[None]
    return [holds(retrieval.tally(ranks, own, protocol_hash="none").mrr, _mean_reciprocal_rank())]


@functools.cache
def _mean_reciprocal_rank() -> float:
    """E[1 / rank] of `_retrieved`: of a geometric rank, p log(1 / p) / (1 − p), integrated over the concepts."""
    p = (np.arange(200_000) + 0.5) / 200_000
    density = 9 * (1 - p) ** 8
    return float(np.mean(density * p * -np.log(p) / (1 - p)))


def _rows(rng: Rng, nets: Sequence[int], seeds: int, spread: Sequence[float], *, of_rows: float) -> SeedTable:
    """A table without effects: rows of nets, whose interaction with the seeds is shared by a net's rows.

    Args:
        rng: generator.
        nets: net of each row.
        seeds: number of seeds.
        spread: standard deviation of each net's interaction.
        of_rows: that of each row's own.
    """
    of_nets = np.asarray(spread)[:, None] * rng.normal(size=(len(spread), seeds))
    values = 3 * rng.normal(size=seeds) + of_nets[list(nets)] + of_rows * rng.normal(size=(len(nets), seeds))
    estimates = {f"row {i}": intervals.mean_over_seeds(row.tolist(), 0.0) for i, row in enumerate(values)}
    return SeedTable(estimates, {f"row {i}": f"net {net}" for i, net in enumerate(nets)})


UNEVEN_EXCESS = 0.09
"""False verdicts against a reference row that spreads four times as much as the others, beyond what is claimed."""
SHARED = (0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
"""The net of each row, in a comparison that evaluates three nets several times."""


def _tables() -> Iterator[tuple[str, Callable[[Rng], SeedTable]]]:
    """Tables of rows, as comparisons and ablations have them."""

    def table(nets: Sequence[int], seeds: int, spread: Sequence[float], of_rows: float) -> Callable[[Rng], SeedTable]:
        return lambda rng: _rows(rng, nets, seeds, spread, of_rows=of_rows)

    for count, seeds in ((6, 3), (6, 2), (20, 3)):
        yield f"{count} rows, each its own net, {seeds} seeds", table(range(count), seeds, [1.0] * count, 0)
    yield "13 rows of 3 nets, 3 seeds, which are all of the spread", table(SHARED, 3, [1.0] * 3, 1e-9)
    yield "13 rows of 3 nets, 3 seeds, half of the spread is the rows' own", table(SHARED, 3, [1.0] * 3, 1)
    for seeds in (3, 2):
        text = f"6 rows, {seeds} seeds, the reference spreads four times as much"
        yield text, table(range(6), seeds, [4.0, *[1.0] * 5], 0)


def _of_tables() -> Iterator[Case]:
    for condition, table in _tables():
        yield Case(
            "difference of rows",
            condition,
            lambda rng, t=table: [not told for told in _verdicts(t(rng))],
            excess=UNEVEN_EXCESS if "four times" in condition else 0,
        )
    unequal = [2] * 4 + [1] * 8
    for counts, text in (([2] * 12, "2 seeds"), (unequal, "of which 4 have 2 seeds, the others 1")):
        yield Case("mean of a row, pooled", f"12 candidates, {text}", lambda rng, c=counts: _pooled(rng, c))

    def independent(rng: Rng) -> list[bool]:
        a, b = (intervals.mean_over_seeds(rng.normal(size=2).tolist(), 0.05) for _ in range(2))
        return [holds(intervals.independent_difference(a, b), 0)]

    yield Case("difference of two candidates", "2 seeds each, not pooled", independent)


def _verdicts(table: SeedTable, *, confidence: float = intervals.CONFIDENCE) -> list[bool]:
    """Whether there is a verdict on each row against the first one."""
    first, *others = table.rows
    return [is_told(table.difference(name, first, confidence=confidence)) for name in others]


def _candidates(rng: Rng, counts: Sequence[int]) -> tuple[list[Estimate], float]:
    """Candidates without effects, each with so many seeds, with intervals pooled over all, and their true value."""
    common = 3 * rng.normal(size=max(counts))
    runs = [(common[:count] + rng.normal(size=count)).tolist() for count in counts]
    return intervals.pool_intervals([intervals.mean_over_seeds(run, 1.0) for run in runs]), float(common.mean())


def _pooled(rng: Rng, counts: Sequence[int]) -> list[bool]:
    candidates, truth = _candidates(rng, counts)
    return [holds(e, truth) for e in candidates]


def _of_ranks() -> Iterator[Case]:
    for count in (4, 6, 8, 12, 40):
        for rho in (0.0, 0.6, 0.9, 0.98):
            truth = 6 / math.pi * math.asin(rho / 2)
            covariance = np.array([[1, rho], [rho, 1]])
            yield Case(
                "rank correlation",
                f"{count} candidates, ρ = {truth:.2f}",
                lambda rng, n=count, c=covariance, t=truth: _ranked(rng, n, c, t),
            )
    for count in (6, 8, 12, 40):
        for ab, ac, bc in ((0.0, 0.0, 0.0), (0.8, 0.5, 0.5), (0.95, 0.8, 0.8)):
            covariance = np.array([[1, ab, ac], [ab, 1, bc], [ac, bc, 1]])
            grades = 6 / np.pi * np.arcsin(covariance / 2)
            spread = math.sqrt((1 - grades[0, 2] ** 2) * (1 - grades[1, 2] ** 2))
            truth = float((grades[0, 1] - grades[0, 2] * grades[1, 2]) / spread)
            yield Case(
                "partial rank correlation",
                f"{count} candidates, ρ = {truth:.2f}",
                lambda rng, n=count, c=covariance, t=truth: _ranked(rng, n, c, t),
            )


def _ranked(rng: Rng, count: int, covariance: Array, truth: float) -> list[bool]:
    columns = np.linalg.cholesky(covariance) @ rng.normal(size=(len(covariance), count))
    rho = float(rank_correlation(columns))
    if math.isnan(rho):
        return []
    low, high = rank_interval(rho, count, controls=len(covariance) - 2)
    return [low <= truth <= high]


FACTORS = [
    KnobSummary("attention", ("true", "false"), ordered=False),
    KnobSummary("convs", ("plain", "separable", "separable ×2"), ordered=False),
    KnobSummary("depth", ("1", "2", "3"), ordered=True),
    KnobSummary("rope", ("false", "true"), ordered=False),
]
SIZES = {
    "true → false": 0.4,
    "plain → separable": -0.5,
    "plain → separable ×2": 0.1,
    "each step of 1 → 2 → 3": -0.2,
    "false → true": 0.0,
}


def _knob_effects(rng: Rng, count: int, scale: float) -> list[tuple[Estimate, float]]:
    """Estimated effects of knobs, each with the true one; the noise is 0.2."""
    points = [{f.name: int(rng.integers(len(f.choices))) for f in FACTORS} for _ in range(count)]
    steps = {"attention": [0, 0.4], "convs": [0, -0.5, 0.1], "depth": [0, -0.2, -0.4], "rope": [0, 0]}
    values = [scale * sum(steps[k][i] for k, i in p.items()) + 0.2 * float(rng.normal()) for p in points]
    result = effects(points, values, FACTORS, relative=False)
    assert result is not None
    return [(e.size, scale * SIZES[e.change]) for knob in result.knobs for e in knob.effects]


def _of_models() -> Iterator[Case]:
    for count in (12, 40):
        yield Case(
            "effect of a knob",
            f"{count} candidates, 4 knobs",
            lambda rng, n=count: [holds(size, truth) for size, truth in _knob_effects(rng, n, 1)],
            share=0.1,
        )
    for count in (12, 40):
        yield Case(
            "predicted latency",
            f"fitted to {count} nets, errors of 3 %",
            lambda rng, n=count: _predicted(rng, n),
            share=0.1,
            nominal=0.9,
        )


def _predicted(rng: Rng, count: int) -> list[bool]:
    """A net that a linear model of six features was not fitted to."""
    features = rng.gamma(2, 1, size=(count + 1, 6))
    times = features @ np.array([1.0, 0.5, 0.2, 0.1, 0.0, 0.0]) * np.exp(0.03 * rng.normal(size=count + 1))
    x, y = features[:-1], times[:-1]
    prior = regression.weak_prior(x, y)
    tolerance = regression.best_tolerance(x, y, prior)
    observed = [regression.Observation(row, float(t), tolerance) for row, t in zip(x, y, strict=True)]
    errors = [error / claimed for error, claimed in regression.leave_one_out(observed, prior)]
    new = regression.Observation(features[-1], float(times[-1]), tolerance)
    error, claimed = regression.fit(observed, prior).error(new)
    return [abs(error) <= regression.conformal_quantile(errors, 0.9) * claimed]


def false_verdicts() -> Iterator[Case]:
    """Cases of verdicts on data without any effect."""
    for condition, table in _tables():
        yield Case(
            "row against the reference",
            condition,
            lambda rng, t=table: _verdicts(t(rng)),
            nominal=0.05,
            excess=UNEVEN_EXCESS if "four times" in condition else 0,
        )

    def at_once(rng: Rng) -> list[bool]:
        table = _rows(rng, range(6), 3, [1.0] * 6, of_rows=0)
        return [any(_verdicts(table, confidence=contrasts.at_once(5)))]

    yield Case("any of the verdicts that hold at once", "6 rows, 3 seeds", at_once, nominal=0.05)

    def additive(rng: Rng) -> list[bool]:
        table = _rows(rng, range(8), 3, [1.0] * 8, of_rows=0)
        base, final, *singles = table.rows
        weights = dict.fromkeys(singles, -1.0) | {final: 1.0, base: len(singles) - 1.0}
        return [is_told(table.contrast(weights))]

    yield Case("more or less than the sum", "6 choices, 3 seeds", additive, nominal=0.05)
    for counts, text in (([2] * 20, "2 seeds"), ([1] * 14 + [2] * 6, "6 of them with 2 seeds, the others 1")):
        yield Case(
            "recommended against the base",
            f"the best of 20 candidates, {text}",
            lambda rng, c=counts: [_best_is_apart(_candidates(rng, c)[0])],
            nominal=0.05,
        )
    yield Case(
        "effect of a knob",
        "12 candidates, 4 knobs",
        lambda rng: [is_told(size) for size, _ in _knob_effects(rng, 12, 0)],
        share=0.1,
        nominal=0.05,
    )


def _best_is_apart(candidates: Sequence[Estimate]) -> bool:
    """Whether the lowest candidate is called better than the first one."""
    base, *others = candidates
    return intervals.are_apart(min(others, key=lambda e: e.value), base)
