"""Main effects of knobs on a metric: Bayesian ridge regression with posterior intervals.

With tens of candidates and about as many columns, least squares would fit noise. Effects are therefore shrunk towards
zero by an amount that is inferred from the data and integrated over. The posterior intervals include the error of the
fit, the noise of the scores and the uncertainty of the shrinkage. See Gelman et al., *Bayesian Data Analysis*, 3rd ed.,
chapter 15; the variance shares are those of a functional ANOVA's main effects (Hooker 2007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archsearch.spaces.summary import KnobSummary
from archsearch.stats.estimate import Estimate
from snapgen.seeding import derive_seed

Array = NDArray[np.float64]

MIN_CANDIDATES = 8
"""Fewest candidates for which effects are estimated."""

DRAWS = 4000
"""Number of posterior samples."""

_RATIOS = np.logspace(-3, 3.5, 53)
"""Grid of the ratio of noise variance to effect variance, over which the shrinkage is integrated."""


@dataclass(frozen=True)
class Effect:
    """Effect of one change of a knob."""

    change: str
    size: Estimate


@dataclass(frozen=True)
class Knob:
    """Effects of a knob: its share of the variance, and the effect of each change."""

    name: str
    share: Estimate
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Effects:
    """Effects of every knob on one metric, estimated from candidates, or counted.

    Attributes:
        n: number of candidates.
        relative: whether effects are relative changes of a positive metric (0.1: 10 % more) instead of differences.
        explained: leave-one-out R², the fraction of a left-out candidate's variance that the effects predict.
        knobs: knobs by decreasing importance, without those for which all candidates have the same choice.
        constant: names of the knobs without variation.
        counted: whether the effects are exact; their intervals are then the smallest and the largest of `n` candidates.
    """

    n: int
    relative: bool
    explained: float
    knobs: tuple[Knob, ...]
    constant: tuple[str, ...]
    counted: bool = False


def effects(
    points: Sequence[Mapping[str, int]], values: Sequence[float], factors: Sequence[KnobSummary], *, relative: bool
) -> Effects | None:
    """Estimate the main effects of every knob on a metric.

    Args:
        points: index of the choice of every knob, for each candidate.
        values: the metric of each candidate; positive if ``relative``.
        factors: the knobs.
        relative: model the logarithm of the metric and return relative changes.

    Returns:
        The effects; None for fewer than `MIN_CANDIDATES` candidates, or if knobs or values do not vary.
    """
    target = np.log(values) if relative else np.asarray(values, dtype=np.float64)
    varied = [f for f in factors if len({point[f.name] for point in points}) > 1]
    if len(points) < MIN_CANDIDATES or not varied or float(np.ptp(target)) <= 1e-9 * float(np.abs(target).max()):
        return None
    # Columns of the design matrix: (n, 1) for an ordered knob, (n, choices) otherwise, with equal prior variance.
    blocks = [_levels(f)[[point[f.name] for point in points]] for f in varied]
    fit = _fit(np.hstack(blocks), target)
    draws = np.split(fit.draws, np.cumsum([b.shape[1] for b in blocks])[:-1], axis=1)
    # Each knob's effect varies over equally frequent choices: (draws, columns) -> (draws, choices) -> (draws,).
    variances = np.stack([(d @ _levels(f).T).var(axis=1) for d, f in zip(draws, varied, strict=True)], axis=1)
    shares = variances / (variances.sum(axis=1, keepdims=True) + fit.noise[:, None])
    knobs = [
        Knob(f.name, _interval(shares[:, i]), _changes(draws[i], f, relative=relative)) for i, f in enumerate(varied)
    ]
    knobs.sort(key=lambda knob: -knob.share.value)
    constant = tuple(f.name for f in factors if f not in varied)
    return Effects(len(points), relative, fit.explained, tuple(knobs), constant)


def _levels(factor: KnobSummary) -> Array:
    """Column values for each choice, (choices, columns), scaled so that equally frequent choices have unit variance."""
    count = len(factor.choices)
    if factor.ordered:
        steps = np.arange(count, dtype=np.float64)[:, None] - (count - 1) / 2
        return np.asarray(steps / steps.std())
    return np.asarray(np.eye(count) * np.sqrt(count / (count - 1)))


@dataclass(frozen=True)
class _Fit:
    draws: Array
    """Posterior samples of the coefficients, (draws, columns)."""
    noise: Array
    """Posterior samples of the noise variance, (draws,)."""
    explained: float
    """Leave-one-out R²."""


def _fit(x: Array, y: Array) -> _Fit:
    """Posterior of y = mean + x β + noise, β ~ N(0, noise / ratio), flat priors on the mean and the log noise."""
    n = len(y)
    x, y = x - x.mean(axis=0), y - y.mean()
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ y  # (n, r), (n,) -> (r,)
    orthogonal = float(y @ y - projected @ projected)
    shrink = s**2 / (s**2 + _RATIOS[:, None])  # (ratios, r)
    misfit = np.maximum(orthogonal + ((1 - shrink) * projected**2).sum(axis=1), 1e-12 * float(y @ y))
    # log marginal likelihood of each ratio, with the noise variance integrated out
    evidence = 0.5 * np.log1p(-np.minimum(shrink, 1 - 1e-15)).sum(axis=1) - (n - 1) / 2 * np.log(misfit)
    # Half-Cauchy prior (Gelman 2006) on the ratio of the effects' standard deviation to the noise's. With a flat prior,
    # a fit with as many columns as candidates could infer that there is no noise.
    evidence -= np.logaddexp(0.5 * np.log(_RATIOS), -0.5 * np.log(_RATIOS))
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    rng = np.random.default_rng(derive_seed(0, "effects"))
    ratio = rng.choice(len(_RATIOS), DRAWS, p=weights)
    noise = misfit[ratio] / rng.chisquare(n - 1, DRAWS)  # scaled inverse chi-squared posterior
    spread = np.sqrt(noise[:, None] / (s**2 + _RATIOS[ratio, None]))
    means = shrink[ratio] * projected / np.where(s > 0, s, 1)
    draws = means + spread * rng.standard_normal((DRAWS, len(s)))
    # directions that the data do not determine keep their prior: (draws, columns), projected onto the null space of x
    prior = np.sqrt(noise / _RATIOS[ratio])[:, None] * rng.standard_normal((DRAWS, x.shape[1]))
    return _Fit(draws @ vt + prior - prior @ vt.T @ vt, noise, _leave_one_out_r2(u, y, weights @ shrink))


def _leave_one_out_r2(u: Array, y: Array, shrink: Array) -> float:
    """Leave-one-out R² of a linear smoother, from residuals divided by one minus leverage."""
    n = len(y)
    hat = (u * shrink) @ u.T + 1 / n  # (n, n)
    errors = (y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9)
    from_mean = y * n / (n - 1)
    return float(1 - (errors @ errors) / (from_mean @ from_mean))


def changes(factor: KnobSummary) -> list[tuple[str, list[tuple[int, int]]]]:
    """The changes of a knob whose effects are told: each with its name, and the indices before and after it.

    For ordered choices it is each step, for others a change of the base's choice.
    """
    names, last = factor.choices, len(factor.choices) - 1
    if factor.ordered and last > 1:
        return [(f"each step of {' → '.join(names)}", [(i, i + 1) for i in range(last)])]
    others = [i for i in range(last + 1) if i != factor.base]
    return [(f"{names[factor.base]} → {names[i]}", [(factor.base, i)]) for i in others]


def _changes(draws: Array, factor: KnobSummary, *, relative: bool) -> tuple[Effect, ...]:
    levels = _levels(factor)
    effects_of_changes = []
    for change, ((old, new), *_) in changes(factor):  # the levels of ordered choices are evenly spaced
        size = draws @ (levels[new] - levels[old])
        effects_of_changes.append(Effect(change, _interval(np.expm1(size) if relative else size)))
    return tuple(effects_of_changes)


def _interval(draws: Array) -> Estimate:
    low, value, high = (float(q) for q in np.quantile(draws, (0.025, 0.5, 0.975)))
    return Estimate(value=value, low=low, high=high)
