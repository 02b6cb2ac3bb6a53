"""Main effects and interactions of knobs in a factorial: least squares, where every combination was scored.

Unlike `archsearch.stats.main_effects`, which shrinks the effects of a few candidates towards zero, nothing is shrunk
here. An effect is an average over all choices of the other knobs. Its interval rests on what main effects and
interactions of two knobs do not explain: the noise of the scores, and interactions of more knobs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from archsearch.spaces.summary import KnobSummary
from archsearch.stats.estimate import Estimate
from archsearch.stats.regression import Array

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Change:
    """A change of one knob from one choice to another."""

    knob: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.knob}: {self.before} → {self.after}"


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
    """

    n: int
    mean: float
    main: Mapping[Change, Estimate]
    interactions: Mapping[tuple[Change, Change], Estimate]
    explained: float
    residual: float


def fit(
    points: Sequence[Mapping[str, int]],
    values: Sequence[float],
    knobs: Sequence[KnobSummary],
    *,
    interactions: bool = True,
) -> FactorialFit:
    """Estimate all effects of a number.

    Args:
        points: index of the choice of every knob, for each architecture.
        values: the number, for each architecture.
        knobs: the knobs; changes start from their base choices.
        interactions: whether interactions of two knobs are estimated; else they count as noise, for few architectures.

    Raises:
        ValueError: if there are too few architectures to tell all effects apart.
    """
    y = np.asarray(values, dtype=np.float64)
    columns = 1 + sum(len(knob.choices) - 1 for knob in knobs)  # of the mean and the main effects
    design = np.array([_inputs(point, knobs) for point in points])[:, : None if interactions else columns]
    rank = int(np.linalg.matrix_rank(design))
    freedom = len(y) - design.shape[1]
    if rank < design.shape[1] or freedom < 1:
        raise ValueError(f"{len(y)} architectures do not tell {design.shape[1]} effects apart; score more")
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ (design.T @ y)
    rest = y - design @ coefficients
    variance = float(rest @ rest) / freedom

    def estimate(contrast: Array) -> Estimate:
        contrast = contrast[: design.shape[1]]
        value = float(contrast @ coefficients)
        half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(
            variance * float(contrast @ inverse @ contrast)
        )
        return Estimate(value=value, low=value - half, high=value + half)

    main = {change: estimate(_main_contrast(change, knobs)) for knob in knobs for change in changes(knob)}
    pairs = {
        (a, b): estimate(_pair_contrast(a, b, knobs))
        for first, second in itertools.combinations(knobs, 2)
        for a, b in itertools.product(changes(first), changes(second) if interactions else ())
    }
    strongest = sorted(
        pairs, key=lambda pair: -abs(pairs[pair].value) / max(1e-300, pairs[pair].high - pairs[pair].low)
    )
    total = float(np.square(y - y.mean()).sum())
    return FactorialFit(
        n=len(y),
        mean=float(coefficients[0]),
        main=main,
        interactions={pair: pairs[pair] for pair in strongest},
        explained=1 - float(rest @ rest) / total if total else 0.0,
        residual=math.sqrt(variance),
    )


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


def _pair_contrast(a: Change, b: Change, knobs: Sequence[KnobSummary]) -> Array:
    zeros = [np.zeros(len(knob.choices) - 1) for knob in knobs]
    by_knob = {change.knob: change for change in (a, b)}
    pair = [
        _difference(by_knob[k.name], k) if k.name in by_knob else zero for k, zero in zip(knobs, zeros, strict=True)
    ]
    return _combined(np.zeros(1), zeros, pair)


def chance_of_sign(differences: Sequence[float], noise: float, *, runs: int, seeds: int) -> float:
    """Probability that a change comes out as better (below 0) in an experiment of its own with a few seeds.

    The experiment compares two architectures that differ in the change alone, in any context (the choices of the other
    knobs). The effects in these contexts are taken to be normal.

    Args:
        differences: effect of the change in each context, as means of ``runs`` paired runs.
        noise: standard deviation of a run's score that pairing does not remove.
        seeds: seeds of each of the experiment's two architectures.
    """
    mean, observed = float(np.mean(differences)), float(np.var(differences, ddof=1))
    between = max(0.0, observed - 2 * noise**2 / runs)
    deviation = math.sqrt(between + 2 * noise**2 / seeds)
    if deviation == 0:
        return float(mean < 0)
    return float(ndtr(-mean / deviation))
