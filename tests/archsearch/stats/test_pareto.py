from __future__ import annotations

import numpy as np
import optuna
import pytest

from archsearch.stats.pareto import bounds, front, hypervolume, hypervolume_history, non_dominated


def test_staircase_by_hand() -> None:
    # Two boxes 2 × 1 and 1 × 2 below the reference that share a unit square.
    assert hypervolume([(1, 2), (2, 1)], (3, 3)) == pytest.approx(3)
    assert hypervolume([(1, 2), (2, 1), (2, 2), (9, 0)], (3, 3)) == pytest.approx(3)
    assert hypervolume([(3, 1)], (3, 3)) == 0
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(0.25,), (0.5,)], (1,)) == pytest.approx(0.75)


def test_three_unit_boxes_in_space() -> None:
    assert hypervolume([(0, 1, 1), (1, 0, 1), (1, 1, 0)], (2, 2, 2)) == pytest.approx(4)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_agrees_with_optunas_hypervolume_history(dimensions: int) -> None:
    rng = np.random.default_rng(dimensions)
    points = [tuple(map(float, p)) for p in rng.random((14, dimensions))]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * dimensions)
    for point in points:
        study.add_trial(optuna.trial.create_trial(values=list(point)))
    reference = (1.1,) * dimensions
    expected = optuna.visualization.plot_hypervolume_history(study, list(reference)).data[0].y
    volumes = [hypervolume(points[: i + 1], reference) for i in range(len(points))]
    assert volumes == pytest.approx(list(expected))


def test_front_keeps_ties_once_and_drops_the_dominated() -> None:
    assert front([(1, 3), (2, 2), (2, 3), (1, 3), (3, 1)]) == [(1, 3), (2, 2), (3, 1)]


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_the_first_of_equal_points_is_kept_and_what_any_other_dominates_is_not(dimensions: int) -> None:
    drawn = np.random.default_rng(dimensions).integers(0, 4, (60, dimensions))
    points = [tuple(map(float, point)) for point in drawn]
    expected = {
        i
        for i, p in enumerate(points)
        if not any(all(a <= b for a, b in zip(q, p, strict=True)) and (q, j) < (p, i) for j, q in enumerate(points))
    }
    kept = non_dominated(points)
    assert set(kept) == expected
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


def test_history_rises_to_the_front() -> None:
    history = hypervolume_history([(2, 2), (1, 3), (3, 1), (3, 3)])
    assert history == sorted(history)
    assert 0 < history[0] < history[-1] < 1
    assert history[-1] == history[-2]  # a dominated point adds nothing


def test_box_of_equal_points_still_has_volume() -> None:
    best, reference = bounds([(5.0, 0.0)])
    assert all(b < r for b, r in zip(best, reference, strict=True))
    assert hypervolume_history([(5.0, 0.0)]) == pytest.approx([1.0])
