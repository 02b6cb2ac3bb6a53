"""What each knob does to a number of the score: a ridge regression on main effects, with posterior intervals.

Tens of candidates, as many columns: least squares would fit noise. So every effect is drawn towards zero as far as
the data themselves ask for (empirical shrinkage, integrated over), and the interval is the posterior's: it takes the
error of the fit, the noise of the scores and the shrinkage's own uncertainty in. See Gelman et al., *Bayesian Data
Analysis*, 3rd ed., 15; the variance shares are those of a functional ANOVA's main effects (Hooker 2007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snapgen.seeding import derive_seed

Array = NDArray[np.float64]

FEWEST = 8
"""Candidates under which no effect is told from any other."""

DRAWS = 4000
_RATIOS = np.logspace(-3, 3.5, 53)
"""Noise variance over effect variance: the grid over which the shrinkage is integrated."""


@dataclass(frozen=True)
class KnobFactor:
    """A knob as the regression sees it: its choices' names, whether they are ordered, which of them is the base's."""

    name: str
    choices: tuple[str, ...]
    ordered: bool
    base: int = 0


@dataclass(frozen=True)
class EffectInterval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Effect:
    """What one change of a knob does."""

    change: str
    size: EffectInterval


@dataclass(frozen=True)
class Knob:
    """What a knob does: its share of the variance, and the effect of each change."""

    name: str
    share: EffectInterval
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Effects:
    """What every knob does to one number.

    Attributes:
        n: candidates behind it.
        relative: whether effects are relative changes (0.1: 10 % more) of a positive number, else differences.
        explained: share of the variance of a left-out candidate that the sum of effects predicts (leave-one-out R²).
        knobs: the most important first; a knob of which every candidate had the same choice is left out.
        constant: names of those left out.
    """

    n: int
    relative: bool
    explained: float
    knobs: tuple[Knob, ...]
    constant: tuple[str, ...]


def effects(
    points: Sequence[Mapping[str, int]], values: Sequence[float], factors: Sequence[KnobFactor], *, relative: bool
) -> Effects | None:
    """Main effects of every knob on a number.

    Args:
        points: each candidate's choice (index) of every knob.
        values: each candidate's number; positive where ``relative``.
        relative: model the logarithm, and give relative changes.

    Returns:
        None where nothing can be said: under `FEWEST` candidates, or all alike.
    """
    target = np.log(values) if relative else np.asarray(values, dtype=np.float64)
    varied = [f for f in factors if len({point[f.name] for point in points}) > 1]
    if len(points) < FEWEST or not varied or float(np.ptp(target)) <= 1e-9 * float(np.abs(target).max()):
        return None
    blocks = [_columns(np.array([point[f.name] for point in points]), f) for f in varied]
    fit = _fit(np.hstack(blocks), target)
    draws = np.split(fit.draws, np.cumsum([b.shape[1] for b in blocks])[:-1], axis=1)
    variances = np.stack([_variance(d, f) for d, f in zip(draws, varied, strict=True)], axis=1)
    shares = variances / (variances.sum(axis=1, keepdims=True) + fit.noise[:, None])
    knobs = [
        Knob(f.name, _interval(shares[:, i]), _changes(draws[i], f, relative=relative)) for i, f in enumerate(varied)
    ]
    knobs.sort(key=lambda knob: -knob.share.value)
    constant = tuple(f.name for f in factors if f not in varied)
    return Effects(len(points), relative, fit.explained, tuple(knobs), constant)


def _columns(chosen: NDArray[np.int64], factor: KnobFactor) -> Array:
    """(n, 1) steps of an ordered knob, (n, choices) indicators of another, scaled to equal prior variance."""
    return np.asarray(_levels(factor)[chosen], dtype=np.float64)


def _levels(factor: KnobFactor) -> Array:
    """The columns' values for each choice: over equally frequent choices their variance is that of one effect."""
    count = len(factor.choices)
    if factor.ordered:
        steps = np.arange(count, dtype=np.float64)[:, None] - (count - 1) / 2
        return np.asarray(steps / steps.std())
    return np.asarray(np.eye(count) * np.sqrt(count / (count - 1)))


@dataclass(frozen=True)
class _Fit:
    draws: Array
    """(draws, columns) of the coefficients."""
    noise: Array
    """(draws,) of the noise variance."""
    explained: float


def _fit(x: Array, y: Array) -> _Fit:
    """Posterior of y = mean + x β + noise, β ~ N(0, noise / ratio), flat priors on the mean and the log noise."""
    n = len(y)
    x, y = x - x.mean(axis=0), y - y.mean()
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    along = u.T @ y
    beside = float(y @ y - along @ along)
    shrink = s**2 / (s**2 + _RATIOS[:, None])
    misfit = np.maximum(beside + ((1 - shrink) * along**2).sum(axis=1), 1e-12 * float(y @ y))
    evidence = 0.5 * np.log1p(-np.minimum(shrink, 1 - 1e-15)).sum(axis=1) - (n - 1) / 2 * np.log(misfit)
    # Half-Cauchy prior (Gelman 2006) on the effects' standard deviation over the noise's. A flat one would let a fit
    # with as many columns as candidates believe that there is no noise.
    evidence -= np.logaddexp(0.5 * np.log(_RATIOS), -0.5 * np.log(_RATIOS))
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    rng = np.random.default_rng(derive_seed(0, "effects"))
    ratio = rng.choice(len(_RATIOS), DRAWS, p=weights)
    noise = misfit[ratio] / rng.chisquare(n - 1, DRAWS)
    spread = np.sqrt(noise[:, None] / (s**2 + _RATIOS[ratio, None]))
    means = shrink[ratio] * along / np.where(s > 0, s, 1)
    draws = means + spread * rng.standard_normal((DRAWS, len(s)))
    beyond = np.sqrt(noise / _RATIOS[ratio])[:, None] * rng.standard_normal((DRAWS, x.shape[1]))
    return _Fit(draws @ vt + beyond - beyond @ vt.T @ vt, noise, _left_out(u, y, weights @ shrink))


def _left_out(u: Array, y: Array, shrink: Array) -> float:
    """Leave-one-out R² of a linear smoother: residuals over one minus leverage."""
    n = len(y)
    hat = (u * shrink) @ u.T + 1 / n
    errors = (y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9)
    from_mean = y * n / (n - 1)
    return float(1 - (errors @ errors) / (from_mean @ from_mean))


def _variance(draws: Array, factor: KnobFactor) -> Array:
    """Each draw's variance of the knob's effect, were its choices equally frequent."""
    return np.asarray((draws @ _levels(factor).T).var(axis=1))


def _changes(draws: Array, factor: KnobFactor, *, relative: bool) -> tuple[Effect, ...]:
    levels, names = _levels(factor), factor.choices
    if factor.ordered and len(names) > 2:
        pairs = [(f"each step of {' → '.join(names)}", 0, 1)]
    elif len(names) == 2:
        pairs = [(f"{names[factor.base]} → {names[1 - factor.base]}", factor.base, 1 - factor.base)]
    else:
        others = [i for i in range(len(names)) if i != factor.base]
        pairs = [(f"{names[factor.base]} → {names[i]}", factor.base, i) for i in others]
    found = []
    for change, old, new in pairs:
        size = draws @ (levels[new] - levels[old])
        found.append(Effect(change, _interval(np.expm1(size) if relative else size)))
    return tuple(found)


def _interval(draws: Array) -> EffectInterval:
    low, value, high = (float(q) for q in np.quantile(draws, (0.025, 0.5, 0.975)))
    return EffectInterval(value, low, high)
