"""An Optuna sampler for studies in which one objective is expensive and the others are known, or cheap to learn.

Stock samplers model latency and cost as if they were as unknown as quality. Here only the expensive objective is
modeled from its trials alone, by a Gaussian process over the parameters and, where that predicts better, over the known
numbers. Each suggestion maximizes the expected hypervolume improvement, which has a closed form: the known objectives
cut the space into boxes (Yang et al. 2019, doi 10.1007/s10898-019-00798-7), and noise and running trials enter by joint
posterior draws at the points tried so far (Daulton et al. 2021, arXiv 2105.08195).

The suggestion is a function of the seed and of the set of trials, in any order, so a resumed study is the unbroken one.
The processes cost the cube of the number of trials. Beyond `MOST_MODELED` complete ones they take those nearest to the
front and as many of the rest, evenly spread over the values; no point of the others is suggested again, either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial, TrialState

from archsearch.samplers.acquisition import Acquisition, Model, choose_model
from archsearch.samplers.grid import Grid, Params, Rows
from archsearch.samplers.screening import KnownNumbers, Screening
from archsearch.samplers.surrogate import RUN_NOISE
from archsearch.stats.regression import Array

RANDOM_POINTS = 1000
"""Random points per pool."""

CLIMBERS, CLIMBS = 6, 8
"""Number of the best points whose neighbors join the pool, and how often that is repeated at most."""

CHECKED = 20
"""Candidates whose known numbers are computed exactly before one of them is chosen."""

MOST_COUNTED = 200
"""Candidates whose known numbers are computed exactly at most, where few are within the limits."""

FEWEST_MODELED = 3
"""Trials with a value before the model is used."""

MOST_MODELED = 100
"""Complete trials that are modeled at most: those nearest to the front, for one half, and a spread of the rest."""

RUNS = "runs"
"""User attribute of a trial with the number of runs that its expensive objective is the mean of."""

MEASURED_NOISE = 0.01
"""Standard deviation of a measured objective, relative to its value."""


class TriedPoint(Protocol):
    """Interface of a trial as suggestions depend on it; Optuna's `FrozenTrial` has it."""

    @property
    def params(self) -> Params:
        """The point."""

    @property
    def state(self) -> TrialState:
        """Complete, running or pruned."""

    @property
    def values(self) -> Any:
        """Values of the objectives, if it is complete."""

    @property
    def user_attrs(self) -> Mapping[str, Any]:
        """Among others `RUNS`."""


@dataclass(frozen=True)
class Observed:
    """A trial with what suggestions derive from it.

    Attributes:
        is_whole: whether it has all parameters.
        is_finite: whether it is complete, and all its values are finite.
    """

    trial: TriedPoint
    is_whole: bool
    identity: Any
    state: TrialState
    values: Any
    is_finite: bool

    @classmethod
    def of(cls, trial: TriedPoint, names: set[str], identity: Callable[[Params], Any]) -> Observed:
        """Derive it."""
        is_whole, state, values = trial.params.keys() == names, trial.state, trial.values
        is_finite = is_whole and state == TrialState.COMPLETE and all(map(math.isfinite, values))
        return cls(trial, is_whole, identity(trial.params) if is_whole else None, state, values, is_finite)


class EHVISampler(BaseSampler):
    """Expected hypervolume improvement with known objectives, for integer and categorical parameters.

    Args:
        known: numbers of a point that are known before it is tried. It is called for some hundred points at first, from
            which `archsearch.samplers.screening.Screening` predicts the others, and for 20 per suggestion.
        objectives: name of the number that each objective of the study is, in its order, and None for the expensive
            one. A name that ``known`` does not give is measured in each trial, and is learned from the trials and the
            known numbers. All objectives are minimized.
        limits: upper bounds on numbers, by name.
        noise: standard deviation of the expensive objective between runs, relative to its value. A trial's
            user attribute ``runs`` is the number of runs that its value is the mean of, without it one; less than one
            for a value that tells less than a run.
        features: whether known numbers are inputs of its model; None: where leave-one-out predictions say so.
        seed: seed of the suggestions.
        screening: share it between samplers, so that the first points are computed once.
        identity: key of a point; points of the same key are the same candidate, which is not suggested twice.

    Raises:
        ValueError: if not exactly one objective is expensive, or the noise or features are no such values.

    Example:
        >>> sampler = EHVISampler(lambda params: {"ms": latency(params)}, objectives=[None, "ms"], seed=0)
        >>> study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    """

    def __init__(
        self,
        known: KnownNumbers,
        *,
        objectives: Sequence[str | None],
        limits: Mapping[str, float] | None = None,
        noise: float = RUN_NOISE,
        features: bool | None = None,
        seed: int = 0,
        screening: Screening | None = None,
        identity: Callable[[Params], Any] | None = None,
    ) -> None:
        if sum(name is None for name in objectives) != 1 or len(objectives) < 2:
            raise ValueError(f"one of several objectives is expensive, but they are {list(objectives)}")
        if not 0 <= noise < 1:
            raise ValueError(f"noise is {noise}; give a share of the value, such as {RUN_NOISE}")
        if features not in (None, False, True):
            raise ValueError(f"features is {features!r}; give true, false or null")
        self._screening = screening or Screening(known)
        self._objectives, self._limits = tuple(objectives), dict(limits or {})
        self._noise, self._features, self._seed = noise, features, seed
        self._identity = identity or (lambda params: tuple(sorted((name, str(v)) for name, v in params.items())))
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all other trials have."""
        return intersection_search_space([t for t in _others(study, trial) if t.params])

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point; empty, so that Optuna samples at random, before the first trial."""
        if not search_space:
            return {}
        return self.suggest(Grid(search_space), _others(study, trial))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value of one parameter."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def suggest(self, grid: Grid, trials: Sequence[TriedPoint]) -> dict[str, Any]:
        """The most promising point of a search space that none of the trials has.

        Args:
            trials: complete, running and pruned trials, in any order; those without all parameters are ignored.
        """
        every = self._observed(grid, trials)
        taken = {o.identity for o in every}
        tried = self._modeled(grid, every)
        rng = np.random.default_rng(self._seed)
        pool, numbers = grid.random(RANDOM_POINTS, rng), self._numbers(grid, [*tried, *_measured_only(every)])
        acquisition = self._acquisition(grid, tried, numbers, rng)
        if acquisition is not None:
            around = [grid.neighbors(row) for row in acquisition.front]
            pool = grid.unique(np.concatenate([pool, *around, grid.mutations(acquisition.front, rng)]))
            pool = self._climb(grid, pool, acquisition, numbers)
        new = (row for row in pool if self._identity(grid.params(row)) not in taken)
        return grid.params(self._best(new, acquisition, numbers, fallback=pool[0]))

    def _observed(self, grid: Grid, trials: Sequence[TriedPoint]) -> list[Observed]:
        """The trials that have all parameters; what was derived from one for an earlier suggestion is kept."""
        key, names = (*grid.names, self._identity), set(grid.names)
        before = self._screening.observed.get(key, {})
        observed = {id(t): before.get(id(t)) or Observed.of(t, names, self._identity) for t in trials}
        self._screening.observed = {key: observed}
        return [o for o in observed.values() if o.is_whole]

    def _modeled(self, grid: Grid, tried: Sequence[Observed]) -> list[TriedPoint]:
        """The trials that the suggestion is computed from, sorted: those that run, and `MOST_MODELED` complete ones."""
        chosen = [o.trial for o in tried if o.state == TrialState.RUNNING]
        complete = [o.trial for o in tried if o.state == TrialState.COMPLETE]
        finite = [o for o in tried if o.is_finite]
        if len(finite) > MOST_MODELED:
            values = np.array([o.values for o in finite])
            order = np.lexsort(values.T)
            tied = (values[order[1:]] == values[order[:-1]]).all(axis=1)
            if tied.any():
                order = np.lexsort((*grid.rows([o.trial.params for o in finite]).T, *values.T))
            complete = [finite[i].trial for i in order[front_and_spread(values[order], MOST_MODELED)]]
        chosen += complete
        return sorted(chosen, key=lambda t: (tuple(grid.row(t.params)), t.state.value, t.values or ()))

    def model(self, grid: Grid, trials: Sequence[TriedPoint]) -> Model | None:
        """The model of the expensive objective after some trials; None while there are too few."""
        which = self._objectives.index(None)
        scored = [t for t in trials if t.state == TrialState.COMPLETE and math.isfinite(t.values[which])]
        if len(scored) < FEWEST_MODELED:
            return None
        rows, values = grid.rows([t.params for t in scored]), np.array([t.values[which] for t in scored])
        known = self._screening.exact(grid, rows)
        variances = np.square(self._noise * values) / [t.user_attrs.get(RUNS, 1) for t in scored]
        return choose_model(grid, rows, known, values, variances, features=self._features)

    def _numbers(self, grid: Grid, tried: Sequence[TriedPoint]) -> Numbers:
        measured = {}
        for i, name in enumerate(self._objectives):
            ended = [t for t in tried if t.state != TrialState.RUNNING]
            scored = [t for t in ended if t.values[i] is not None and t.values[i] > 0]
            if name is None or not scored or name in self._screening.regression(grid).largest:
                continue
            rows = grid.rows([t.params for t in scored])
            logs = np.log([t.values[i] for t in scored])
            variances = np.full(len(rows), MEASURED_NOISE**2)
            measured[name] = Model.fit(grid, rows, self._screening.exact(grid, rows), logs, variances)
        return Numbers(grid, self._screening, measured)

    def _acquisition(
        self, grid: Grid, tried: Sequence[TriedPoint], numbers: Numbers, rng: np.random.Generator
    ) -> Acquisition | None:
        model = self.model(grid, tried)
        if model is None:
            return None
        which = self._objectives.index(None)
        seen = [t for t in tried if t.state == TrialState.RUNNING or math.isfinite(t.values[which])]
        rows = grid.rows([t.params for t in seen])
        known = numbers.exact(rows)
        for i, name in enumerate(self._objectives):
            if name is not None and name in numbers.measured:
                pairs = zip(seen, known[name], strict=True)
                known[name] = np.array([p if t.state == TrialState.RUNNING else t.values[i] for t, p in pairs])
        names = [name for name in self._objectives if name is not None]
        largest = np.array([max(numbers.largest(name), known[name].max()) for name in names])
        return Acquisition(model, rows, known, names, largest, self._limits, rng)

    def _climb(self, grid: Grid, pool: Rows, acquisition: Acquisition, numbers: Numbers) -> Rows:
        """The pool and what its best points lead to, neighbor by neighbor, the most promising first."""
        value = acquisition(pool, numbers.predict(pool))
        for _ in range(CLIMBS):
            best = pool[np.argsort(-value, kind="stable")[:CLIMBERS]]
            around = grid.unique(np.concatenate([grid.neighbors(row) for row in best]), known=pool)
            added = acquisition(around, numbers.predict(around))
            top = value.max()
            pool, value = np.concatenate([pool, around]), np.concatenate([value, added])
            if added.max(initial=-math.inf) <= top:
                break
        climbed: Rows = pool[np.argsort(-value, kind="stable")]
        return climbed

    def _best(self, rows: Any, acquisition: Acquisition | None, numbers: Numbers, *, fallback: Rows) -> Rows:
        """By exact numbers the best of the first `CHECKED` rows that are valid and within the limits.

        If there is none, the row nearest to the limits.
        """
        checked: list[tuple[Rows, Mapping[str, float]]] = []
        nearest, counted = (True, math.inf), 0
        for row in rows:
            if counted == MOST_COUNTED:
                break  # the limits leave few points, or none
            exact = numbers.at(row)
            if exact is None:
                continue
            counted += 1
            ratios = {name: exact[name] / limit for name, limit in self._limits.items() if name in exact}
            excess = max(ratios.values(), default=0.0)
            # A limit on what is known for certain is kept before one on what is learned.
            breaks_known = any(ratio > 1 for name, ratio in ratios.items() if name not in numbers.measured)
            if excess <= 1:
                checked.append((row, exact))
            elif (breaks_known, excess) < nearest:
                fallback, nearest = row, (breaks_known, excess)
            if len(checked) == (1 if acquisition is None else CHECKED):
                break
        if not checked:
            return fallback
        if acquisition is None:
            return checked[0][0]
        known = {name: np.array([exact[name] for _, exact in checked]) for name in checked[0][1]}
        return checked[int(np.argmax(acquisition(np.array([row for row, _ in checked]), known)))][0]


def _measured_only(every: Sequence[Observed]) -> list[TriedPoint]:
    """Pruned trials with a measured value, whose limits are learned from them; at most `MOST_MODELED`, the lowest."""
    pruned = [o for o in every if o.state == TrialState.PRUNED and any(v is not None for v in o.values or ())]
    lowest = sorted(pruned, key=lambda o: tuple(math.inf if v is None else v for v in o.values))
    return [o.trial for o in lowest[:MOST_MODELED]]


def front_and_spread(values: Array, count: int) -> Rows:
    """Rows of the trials nearest to the front, for one half of a count, and of a spread of the rest, for the other.

    Args:
        values: objectives of the trials, of shape (trials, objectives); all are minimized. The rest is taken at equal
            steps, so the choice depends on the set of trials alone if these are sorted.
    """
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in values.T], axis=1)
    front = _front(ranks)
    if len(front) > count // 2:
        front = front[np.argsort(ranks[front, 0], kind="stable")]
        front = _evenly(front, count // 2)
    # By how many ranks a trial would have to gain in every objective to be dominated by none of the front.
    behind = (ranks[:, None] - ranks[None, front]).min(axis=2).max(axis=1).clip(0)
    behind[front] = -1
    order = np.argsort(behind, kind="stable")
    near = order[: count // 2]
    return np.concatenate([near, _evenly(np.sort(order[count // 2 :]), count - len(near))])


def _front(ranks: Rows) -> Rows:
    """Rows of the trials that no other one dominates; the first of equal ones."""
    left = np.argsort(ranks.sum(axis=1), kind="stable")  # whatever dominates a trial comes before it
    front = []
    while len(left):
        front.append(left[0])
        left = left[(ranks[left] < ranks[left[0]]).any(axis=1)]
    return np.array(front)


def _evenly(indices: Rows, count: int) -> Rows:
    chosen: Rows = indices[np.linspace(0, len(indices) - 1, count).astype(int)]
    return chosen


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)
    return [t for t in study.get_trials(deepcopy=False, states=states) if t.number != trial.number]


class Numbers:
    """Numbers of points other than the expensive one: known ones, and predictions of those that trials measure.

    Attributes:
        measured: models of the logarithms of the numbers that trials measure, by name.
    """

    def __init__(self, grid: Grid, screening: Screening, measured: Mapping[str, Model]) -> None:
        self._grid, self._screening, self.measured = grid, screening, measured

    def predict(self, rows: Rows) -> dict[str, Array]:
        """Predicted numbers of many points."""
        return self._with_measured(rows, self._screening.predict(self._grid, rows))

    def exact(self, rows: Rows) -> dict[str, Array]:
        """Exact known numbers of some points, with predictions of measured ones."""
        return self._with_measured(rows, self._screening.exact(self._grid, rows))

    def at(self, row: Rows) -> dict[str, float] | None:
        """The same for one point; None if it is invalid."""
        if self._screening.at(self._grid, row) is None:
            return None
        return {name: float(column[0]) for name, column in self.exact(row[None]).items()}

    def largest(self, name: str) -> float:
        """Largest number at random points of the search space."""
        regression = self._screening.regression(self._grid)
        if name in regression.largest:
            return regression.largest[name]
        return float(self.exact(regression.rows)[name].max())

    def _with_measured(self, rows: Rows, known: dict[str, Array]) -> dict[str, Array]:
        return known | {name: np.exp(model.predict(rows, known)) for name, model in self.measured.items()}
