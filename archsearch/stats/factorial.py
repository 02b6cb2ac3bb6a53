"""Main effects and interactions of knobs in a factorial: least squares, where every combination was scored.

Unlike `archsearch.stats.main_effects`, which shrinks the effects of a few candidates towards zero, nothing is shrunk
here. An effect is an average over all choices of the other knobs. The interval of an effect on a number without seeds
(`fit`) rests on what main effects and interactions of two knobs do not explain. That of a main effect on a score of
several seeds (`fit_over_seeds`) rests on how much the effect differs between seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import ndtr

from archsearch.spaces.summary import KnobSummary
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import quantile
from archsearch.stats.regression import Array


@dataclass(frozen=True)
class Change:
    """A change of one knob from one choice to another."""

    knob: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.knob}: {self.before} → {self.after}"


@dataclass(frozen=True)
class OverSeeds:
    """How an effect came out over seeds.

    Attributes:
        seeds: number of seeds with which it was estimated.
        complete: its mean over the seeds that all architectures have.
        between: standard deviation between seeds, without the error of each estimate.
    """

    seeds: int
    complete: float
    between: float


@dataclass(frozen=True)
class FactorialFit:
    """Effects on one number.

    Attributes:
        n: number of architectures.
        mean: mean over all combinations.
        main: effect of each change.
        interactions: by how much the effect of one change differs after another one, the largest first, in units of
            their standard errors.
        explained: share of the variance that these effects explain.
        residual: standard deviation of the rest.
        over_seeds: where there are several seeds, how each main effect came out over them.
    """

    n: int
    mean: float
    main: Mapping[Change, Estimate]
    interactions: Mapping[tuple[Change, Change], Estimate]
    explained: float
    residual: float
    over_seeds: Mapping[Change, OverSeeds] = field(default_factory=dict)


def fit(
    points: Sequence[Mapping[str, int]],
    values: Sequence[float],
    knobs: Sequence[KnobSummary],
    *,
    interactions: bool = True,
) -> FactorialFit:
    """Estimate all effects of a number that no seeds vary.

    Args:
        points: index of the choice of every knob, for each architecture.
        values: the number, for each architecture.
        knobs: the knobs; changes start from their base choices.
        interactions: whether interactions of two knobs are estimated; else they count as noise, for few architectures.

    Raises:
        ValueError: if there are too few architectures to tell all effects apart.
    """
    design = _design(points, knobs)
    return _summary(_least_squares(design if interactions else design[:, : _num_main(knobs)], values), knobs)


def _summary(found: _LeastSquares, knobs: Sequence[KnobSummary]) -> FactorialFit:
    has_interactions = len(found.coefficients) > _num_main(knobs)
    main = {change: found.interval(contrast) for change, contrast in _main_contrasts(knobs).items()}
    pairs = {
        (a, b): found.interval(_pair_contrast(a, b, knobs))
        for first, second in itertools.combinations(knobs, 2)
        for a, b in itertools.product(changes(first), changes(second) if has_interactions else ())
    }
    strongest = sorted(
        pairs, key=lambda pair: -abs(pairs[pair].value) / max(1e-300, pairs[pair].high - pairs[pair].low)
    )
    values = found.fitted + found.rest
    total = float(np.square(values - values.mean()).sum())
    return FactorialFit(
        n=len(values),
        mean=float(found.coefficients[0]),
        main=main,
        interactions={pair: pairs[pair] for pair in strongest},
        explained=1 - float(found.rest @ found.rest) / total if total else 0.0,
        residual=math.sqrt(found.variance),
    )


def fit_over_seeds(
    points: Sequence[Mapping[str, int]], scores: Sequence[Mapping[int, float]], knobs: Sequence[KnobSummary]
) -> FactorialFit:
    """Estimate all effects of a score of several seeds, so that the intervals of main effects hold for other seeds.

    A seed fixes the same random draws for all architectures, and these suit some choices better than others, whatever
    the other knobs are: hundreds of architectures with two seeds tell exactly what a change does with these two. Each
    main effect is thus estimated for every seed, also for those that only some architectures have, and its mean is that
    of a random-effects meta-analysis: the variance between seeds by DerSimonian and Laird (1986), the interval by
    Hartung and Knapp (2001). With two seeds it is wide.

    Interactions are estimated from the seeds that all architectures have, and their intervals are of these seeds alone.

    Args:
        points: as in `fit`.
        scores: the score by seed, for each architecture. A seed whose architectures are too few to tell the main
            effects apart is left out.

    Raises:
        ValueError: if no seed is common to all, or there are too few architectures.
    """
    complete = set.intersection(*(set(by_seed) for by_seed in scores)) if scores else set()
    if not complete:
        raise ValueError("the architectures have no seed in common")
    values = [float(np.mean([by_seed[seed] for seed in complete])) for by_seed in scores]
    design, contrasts = _design(points, knobs), _main_contrasts(knobs)
    of_complete = _least_squares(design, values)
    whole = _summary(of_complete, knobs)
    by_change: dict[Change, list[tuple[float, float]]] = {change: [] for change in contrasts}
    for seed in sorted({seed for by_seed in scores for seed in by_seed}):
        having = [i for i, by_seed in enumerate(scores) if seed in by_seed]
        # What the seeds common to all explain is taken off first, so that those of a few architectures are not mistaken
        # for their interactions.
        rest = [scores[i][seed] - of_complete.fitted[i] for i in having]
        try:
            found = _least_squares(design[having, : None if seed in complete else _num_main(knobs)], rest)
        except ValueError:
            continue
        for change, contrast in contrasts.items():
            difference, error = found.effect(contrast)
            by_change[change].append((whole.main[change].value + difference, error))
    means = {change: _random_effects_mean(effects) for change, effects in by_change.items() if len(effects) > 1}
    if not means:
        return whole
    over_seeds = {
        change: OverSeeds(len(by_change[change]), whole.main[change].value, between)
        for change, (_, between) in means.items()
    }
    return replace(whole, main={change: mean for change, (mean, _) in means.items()}, over_seeds=over_seeds)


def _random_effects_mean(effects: Sequence[tuple[float, float]]) -> tuple[Estimate, float]:
    """Mean of effects, each with its standard error, over the seeds from which they are, and the deviation of these."""
    values, errors = (np.array(column) for column in zip(*effects, strict=True))
    precision = 1 / np.maximum(errors**2, 1e-100)  # values of made-up seeds may agree exactly
    fixed = float(precision @ values / precision.sum())
    excess = float(precision @ (values - fixed) ** 2) - (len(values) - 1)
    between = max(0.0, excess / float(precision.sum() - np.square(precision).sum() / precision.sum()))
    weights = 1 / (1 / precision + between)
    mean = float(weights @ values / weights.sum())
    # Hartung and Knapp's scale is not taken below 1: seeds that happen to agree do not make the errors smaller.
    scale = max(1.0, float(weights @ (values - mean) ** 2) / (len(values) - 1))
    half = quantile(len(values) - 1) * math.sqrt(scale / float(weights.sum()))
    return Estimate(value=mean, low=mean - half, high=mean + half), math.sqrt(between)


@dataclass(frozen=True)
class _LeastSquares:
    """A least-squares fit; ``rest`` is what it leaves, with a variance of ``freedom`` degrees of freedom."""

    coefficients: Array
    inverse: Array
    fitted: Array
    rest: Array
    freedom: int

    @property
    def variance(self) -> float:
        return float(self.rest @ self.rest) / self.freedom

    def effect(self, contrast: Array) -> tuple[float, float]:
        """An effect and its standard error."""
        contrast = contrast[: len(self.coefficients)]
        error = math.sqrt(self.variance * float(contrast @ self.inverse @ contrast))
        return float(contrast @ self.coefficients), error

    def interval(self, contrast: Array) -> Estimate:
        value, error = self.effect(contrast)
        half = quantile(self.freedom) * error
        return Estimate(value=value, low=value - half, high=value + half)


def _least_squares(design: Array, values: Sequence[float]) -> _LeastSquares:
    y = np.asarray(values, dtype=np.float64)
    freedom = len(y) - design.shape[1]
    if freedom < 1 or int(np.linalg.matrix_rank(design)) < design.shape[1]:
        raise ValueError(f"{len(y)} architectures do not tell {design.shape[1]} effects apart; score more")
    inverse = np.linalg.inv(design.T @ design).astype(np.float64, copy=False)
    coefficients = inverse @ (design.T @ y)
    fitted = design @ coefficients
    return _LeastSquares(coefficients, inverse, fitted, y - fitted, freedom)


def _design(points: Sequence[Mapping[str, int]], knobs: Sequence[KnobSummary]) -> Array:
    """Inputs of each point: the mean's and those of main effects, `_num_main` columns, and then the interactions'."""
    return np.array([_inputs(point, knobs) for point in points])


def _num_main(knobs: Sequence[KnobSummary]) -> int:
    return 1 + sum(len(knob.choices) - 1 for knob in knobs)


def changes(knob: KnobSummary) -> list[Change]:
    """Changes of a knob: from its base choice to each other one, and between these."""
    order = [knob.choices[knob.base], *(c for i, c in enumerate(knob.choices) if i != knob.base)]
    return [Change(knob.name, before, after) for before, after in itertools.combinations(order, 2)]


def _inputs(point: Mapping[str, int], knobs: Sequence[KnobSummary]) -> Array:
    """1, the main effects, and the interactions of two knobs, each knob coded by `_code`."""
    codes = [_code(point[knob.name], len(knob.choices)) for knob in knobs]
    return _combined(np.ones(1), codes, codes)


def _combined(one: Array, main: Sequence[Array], pairs: Sequence[Array]) -> Array:
    products = [np.outer(a, b).ravel() for a, b in itertools.combinations(pairs, 2)]
    return np.concatenate([one, *main, *products])


def _code(choice: int, count: int) -> Array:
    """Sum-to-zero coding: over all choices, each input adds up to 0."""
    indicator = np.eye(count)[choice]
    code: Array = indicator[:-1] - indicator[-1]
    return code


def _difference(change: Change, knob: KnobSummary) -> Array:
    after, before = (knob.choices.index(choice) for choice in (change.after, change.before))
    return _code(after, len(knob.choices)) - _code(before, len(knob.choices))


def _main_contrast(change: Change, knobs: Sequence[KnobSummary]) -> Array:
    zeros = [np.zeros(len(knob.choices) - 1) for knob in knobs]
    main = [_difference(change, k) if k.name == change.knob else zero for k, zero in zip(knobs, zeros, strict=True)]
    return _combined(np.zeros(1), main, zeros)


def _main_contrasts(knobs: Sequence[KnobSummary]) -> dict[Change, Array]:
    return {change: _main_contrast(change, knobs) for knob in knobs for change in changes(knob)}


def _pair_contrast(a: Change, b: Change, knobs: Sequence[KnobSummary]) -> Array:
    zeros = [np.zeros(len(knob.choices) - 1) for knob in knobs]
    by_knob = {change.knob: change for change in (a, b)}
    pair = [
        _difference(by_knob[k.name], k) if k.name in by_knob else zero for k, zero in zip(knobs, zeros, strict=True)
    ]
    return _combined(np.zeros(1), zeros, pair)


def chance_of_sign(differences: Sequence[Sequence[float]], *, seeds: int) -> float:
    """Probability that a change comes out as better (below 0) in an experiment of its own with a few seeds.

    The experiment compares two architectures that differ in the change alone, in any context (the choices of the other
    knobs), with the same seeds. The effects in these contexts, and those of seeds on them, are taken to be normal.

    Args:
        differences: effect of the change by context and seed, as many seeds in each.
        seeds: seeds of the experiment.
    """
    table = np.asarray(differences, dtype=np.float64)  # (contexts, S)
    within = float(table.var(axis=1, ddof=1).mean()) if table.shape[1] > 1 else 0.0
    between = max(0.0, float(table.mean(axis=1).var(ddof=1)) - within / table.shape[1])
    mean, deviation = float(table.mean()), math.sqrt(between + within / seeds)
    if deviation == 0:
        return float(mean < 0)
    return float(ndtr(-mean / deviation))
