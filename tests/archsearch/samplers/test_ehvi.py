"""The sampler that knows costs: its model, its improvement, its suggestions."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from archsearch.samplers import ehvi
from archsearch.samplers.acquisition import DominatedRegion
from archsearch.samplers.ehvi import EHVISampler, front_and_spread
from archsearch.samplers.grid import Grid
from archsearch.samplers.screening import Screening
from archsearch.samplers.surrogate import Columns, fit
from archsearch.stats.pareto import hypervolume, non_dominated
from archsearch.studies.search.samplers import ObservedTrial

CHOICES: Mapping[str, BaseDistribution] = {
    "width": IntDistribution(1, 8),
    "depth": IntDistribution(1, 4),
    "conv": CategoricalDistribution(("plain", "separable")),
}


def milliseconds(params: Mapping[str, Any]) -> float:
    return float(params["width"] * params["depth"] * (2 if params["conv"] == "plain" else 1))


def known(params: Mapping[str, Any]) -> dict[str, float] | None:
    return None if params["width"] == 8 and params["depth"] == 4 else {"ms": milliseconds(params)}


def loss(params: Mapping[str, Any]) -> float:
    return 3 / params["width"] + 1 / params["depth"] + (0.2 if params["conv"] == "separable" else 0)


def tried(count: int, *, seed: int = 0) -> list[FrozenTrial]:
    rng, found = random.Random(seed), []
    while len(found) < count:
        params = {"width": rng.randint(1, 8), "depth": rng.randint(1, 4), "conv": rng.choice(["plain", "separable"])}
        if known(params) and all(t.params != params for t in found):
            values = [loss(params), milliseconds(params)]
            found.append(create_trial(params=params, distributions=dict(CHOICES), values=values))
    return found


def sampler(**arguments: Any) -> EHVISampler:
    return EHVISampler(known, **{"objectives": (None, "ms"), "seed": 3, **arguments})


# The model


def test_the_gradient_of_the_posterior_is_that_of_differences() -> None:
    from archsearch.samplers.surrogate import _negative_log_posterior

    rng = np.random.default_rng(0)
    inputs, y = rng.random((9, 4)), rng.standard_normal(9)
    columns = Columns(np.array([True, False, False, False]), np.array([False, False, True, True]))
    squares = columns.squared_distances(inputs, inputs)
    products = inputs.T[2:][:, :, None] * inputs.T[2:][:, None, :]
    prior = (np.zeros(7), np.ones(7))
    arguments = (squares, products, y, np.full(9, 0.01), *prior)
    theta = rng.standard_normal(7) * 0.3
    gradient = _negative_log_posterior(theta, *arguments)[1]
    for i in range(7):
        step = np.eye(7)[i] * 1e-5
        slope = (
            _negative_log_posterior(theta + step, *arguments)[0] - _negative_log_posterior(theta - step, *arguments)[0]
        )
        assert gradient[i] == pytest.approx(slope / 2e-5, rel=1e-4, abs=1e-5)


def test_leave_one_out_is_a_fit_without_the_observation() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.random((12, 2))
    values = np.sin(3 * inputs[:, 0]) + 0.05 * rng.standard_normal(12)
    columns = Columns(np.zeros(2, bool), np.zeros(2, bool))
    process = fit(columns, inputs, values, np.full(12, 0.05**2))
    covariance = process.kernel(inputs, inputs) + np.diag(process.noise + 1e-6)
    kept = np.arange(12) != 4
    weights = np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept, 4])
    assert process.leave_one_out[0][4] == pytest.approx(weights @ process.values[kept])
    assert process.leave_one_out[1][4] == pytest.approx(covariance[4, 4] - weights @ covariance[kept, 4])
    assert process.r_squared > 0.4


def test_categories_have_no_order() -> None:
    columns = Columns(np.array([True, False]), np.zeros(2, bool))
    squares = columns.squared_distances(np.array([[0.0, 0.0]]), np.array([[2.0, 0.5], [1.0, 0.5]]))
    assert squares[:, 0].tolist() == [[1.0, 1.0], [0.25, 0.25]]


# The improvement


@pytest.mark.parametrize("known_count", [1, 2])
def test_the_improvement_is_that_of_samples(known_count: int) -> None:
    rng = np.random.default_rng(2)
    points, reference = rng.random((6, known_count + 1)), np.ones(known_count + 1)
    region = DominatedRegion.of(points[:, :-1], points[:, -1], reference)
    candidate, mean, deviation = rng.random((1, known_count)) * 0.7, np.array([0.4]), np.array([0.2])
    before = hypervolume([tuple(p) for p in points], tuple(reference))
    drawn = mean + deviation * rng.standard_normal(4000)
    gains = [hypervolume([tuple(p) for p in points] + [(*candidate[0], v)], tuple(reference)) - before for v in drawn]
    expected = region.expected_improvement(candidate, mean, deviation)[0]
    assert abs(np.mean(gains) - expected) < 4 * np.std(gains) / math.sqrt(len(gains))
    assert expected > 0


def test_a_dominated_candidate_that_is_certain_gains_nothing() -> None:
    region = DominatedRegion.of(np.array([[0.2]]), np.array([0.2]), np.array([1.0, 1.0]))
    certain = np.array([1e-9, 1e-9])
    gains = region.expected_improvement(np.array([[0.5], [0.1]]), np.array([0.5, 0.5]), certain)
    assert gains == pytest.approx([0.0, 0.1 * 0.5], abs=1e-6)


# Screening


def test_the_screening_predicts_what_it_was_not_shown() -> None:
    """A third of the points tells the others, whose numbers are products of effects, within a few percent."""
    asked: list[Mapping[str, Any]] = []

    def count(params: Mapping[str, Any]) -> dict[str, float]:
        asked.append(params)
        return {"ms": math.exp(0.3 * params["a"] + 0.2 * params["b"] + 0.5 * (params["c"] == 1))}

    grid = Grid({"a": IntDistribution(0, 5), "b": IntDistribution(0, 5), "c": CategoricalDistribution((0, 1, 2))})
    screening = Screening(count, counted=40)
    every = grid.unique(grid.random(2000, np.random.default_rng(1)))
    assert len(every) == 108
    errors = np.log(screening.predict(grid, every)["ms"])
    assert len(asked) == 40
    errors = errors - np.log(screening.exact(grid, every)["ms"])
    assert float(np.sqrt(np.mean(errors**2))) < 0.05


# Suggestions


def test_a_suggestion_depends_on_the_set_of_trials_not_on_their_order() -> None:
    trials = tried(10)
    shuffled = random.Random(1).sample(trials, len(trials))
    assert sampler().suggest(Grid(CHOICES), trials) == sampler().suggest(Grid(CHOICES), shuffled)


def test_nothing_is_suggested_twice_until_all_is_tried() -> None:
    trials = tried(3)
    for _ in range(59):  # 64 points, of which 2 are invalid
        params = sampler().suggest(Grid(CHOICES), trials)
        assert known(params) is not None
        assert all(t.params != params for t in trials)
        values = [loss(params), milliseconds(params)]
        trials.append(create_trial(params=params, distributions=dict(CHOICES), values=values))


def test_limits_are_kept() -> None:
    asked = [sampler(limits={"ms": 6.0}, seed=s).suggest(Grid(CHOICES), tried(8, seed=s)) for s in range(5)]
    assert all(milliseconds(params) <= 6 for params in asked)


def test_a_measured_limit_is_learned_from_the_trials_that_broke_it() -> None:
    """A trial over the limit was measured and not trained; most points are over it, and soon none is suggested."""

    def observed(slot: int, params: Mapping[str, Any]) -> ObservedTrial:
        ms = milliseconds(params)
        value = loss(params) if ms <= 8 else None
        return ObservedTrial(slot, {name: _index(name, choice) for name, choice in params.items()}, (value, ms))

    def _index(name: str, choice: Any) -> int:
        return ("plain", "separable").index(choice) if name == "conv" else choice

    choices = {**CHOICES, "conv": CategoricalDistribution((0, 1))}
    over = [t.params for t in tried(40, seed=1) if milliseconds(t.params) > 8][:6]
    trials = [observed(slot, params) for slot, params in enumerate(over)]
    for slot in range(len(trials), 18):
        asked = EHVISampler(lambda _: {}, objectives=(None, "ms"), limits={"ms": 8.0}, seed=slot)
        params = asked.suggest(Grid(choices), trials)
        trials.append(observed(slot, {**params, "conv": ("plain", "separable")[params["conv"]]}))
    over_later = [t for t in trials[6:] if t.values[0] is None]
    assert len(over_later) <= 4, "of twelve; by chance nine"


def test_an_unreachable_limit_gives_what_is_nearest() -> None:
    params = sampler(limits={"ms": 0.5}).suggest(Grid(CHOICES), tried(4))
    assert milliseconds(params) <= 2


def test_a_running_trial_is_not_suggested_and_moves_the_next_suggestion() -> None:
    trials = tried(8)
    first = sampler().suggest(Grid(CHOICES), trials)
    running = create_trial(state=TrialState.RUNNING, params=first, distributions=dict(CHOICES))
    assert sampler().suggest(Grid(CHOICES), [*trials, running]) != first


def test_of_many_trials_those_near_the_front_and_a_spread_are_modeled() -> None:
    rng = np.random.default_rng(4)
    values = rng.random((500, 2))
    chosen = front_and_spread(values, 40)
    assert len(chosen) == len(set(chosen)) == 40
    front = non_dominated([tuple(v) for v in values])
    assert set(front) <= set(chosen[:20])
    assert values[chosen[:20]].prod(axis=1).mean() < values.prod(axis=1).mean() / 5
    rest = np.sort(chosen[20:])
    assert rest[0] < 50
    assert rest[-1] > 450
    assert np.diff(rest).max() < 50


def test_a_front_of_too_many_is_thinned() -> None:
    along = np.linspace(0, 1, 300)
    chosen = front_and_spread(np.stack([along, 1 - along, np.zeros(300)], axis=1), 20)
    assert len(set(chosen)) == 20
    assert np.diff(np.sort(chosen[:10])).max() < 40


def test_the_model_is_bounded_and_what_it_leaves_out_is_not_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    modeled, trials = [], tried(50)
    fit_all = EHVISampler.model
    monkeypatch.setattr(ehvi, "MOST_MODELED", 12)
    monkeypatch.setattr(EHVISampler, "model", lambda self, grid, t: modeled.append(t) or fit_all(self, grid, t))
    running = create_trial(state=TrialState.RUNNING, params=trials.pop().params, distributions=dict(CHOICES))
    params = sampler().suggest(Grid(CHOICES), [*trials, running])
    shuffled = random.Random(1).sample(trials, len(trials))
    assert sampler().suggest(Grid(CHOICES), [running, *shuffled]) == params
    assert modeled[0] == modeled[1]
    assert len(modeled[0]) == 13
    assert running in modeled[0]
    assert all(t.params != params for t in [*trials, running])


@pytest.mark.parametrize("measured", [False, True])
def test_it_finds_the_front_in_fewer_trials_than_chance(measured: bool) -> None:
    def share(trials: list[FrozenTrial]) -> float:
        return hypervolume([(math.log(t.values[1]), t.values[0]) for t in trials], (math.log(64), 4.2))

    shares: dict[str, list[float]] = {"ehvi": [], "random": []}
    for seed in range(4):
        trials = tried(4, seed=seed)
        while len(trials) < 14:
            chosen = EHVISampler(
                known if not measured else lambda p: {} if known(p) else None, objectives=(None, "ms"), seed=len(trials)
            ).suggest(Grid(CHOICES), trials)
            values = [loss(chosen), milliseconds(chosen)]
            trials.append(create_trial(params=chosen, distributions=dict(CHOICES), values=values))
        shares["ehvi"].append(share(trials))
        shares["random"].append(share(tried(14, seed=seed)))
    assert np.mean(shares["ehvi"]) > np.mean(shares["random"]) * 1.03


def test_it_is_a_sampler_of_optuna() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler())

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        params = {
            "width": trial.suggest_int("width", 1, 8),
            "depth": trial.suggest_int("depth", 1, 4),
            "conv": trial.suggest_categorical("conv", ["plain", "separable"]),
        }
        return loss(params), milliseconds(params)

    study.optimize(objective, n_trials=10)
    assert len({tuple(t.params.items()) for t in study.trials[1:]}) == 9


def test_exactly_one_objective_is_expensive() -> None:
    for objectives in ((None, None), ("ms", "params"), (None,)):
        with pytest.raises(ValueError, match="one of several objectives is expensive"):
            EHVISampler(known, objectives=objectives)


def test_a_real_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter rate is neither an integer nor a category"):
        Grid({"rate": optuna.distributions.FloatDistribution(0, 1)}).random(1, np.random.default_rng(0))
