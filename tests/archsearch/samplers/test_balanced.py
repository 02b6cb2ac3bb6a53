from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from archsearch.samplers.balanced import balanced_order
from archsearch.samplers.grid import Grid, Rows
from archsearch.spaces.loading import load_space
from archsearch.studies.search.samplers import distributions


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid(distributions(load_space("emoji-factorial").knobs))


@pytest.fixture(scope="module")
def rows(grid: Grid) -> Rows:
    return np.stack(np.meshgrid(*map(np.arange, grid.counts), indexing="ij"), axis=-1).reshape(-1, len(grid.counts))


def test_every_row_comes_once_and_the_first_ones_first(grid: Grid, rows: Rows) -> None:
    order = balanced_order(grid, rows, first=3)
    assert sorted(map(tuple, order.tolist())) == sorted(map(tuple, rows.tolist()))
    assert order[:3].tolist() == rows[:3].tolist()


@pytest.mark.parametrize("count", [24, 32, 64])
def test_every_first_part_has_each_choice_and_each_pair_about_equally_often(grid: Grid, rows: Rows, count: int) -> None:
    part = balanced_order(grid, rows, first=2)[:count]
    for i, choices in enumerate(grid.counts):
        assert np.ptp(np.bincount(part[:, i], minlength=choices)) <= max(3, count // 8)
        for k in range(i):
            pairs = Counter(zip(part[:, i].tolist(), part[:, k].tolist(), strict=True))
            cells = int(choices * grid.counts[k])
            assert len(pairs) == cells
            assert max(pairs.values()) <= 1.5 * count / cells


def test_a_seed_decides_between_equals(grid: Grid, rows: Rows) -> None:
    first, again, other = (balanced_order(grid, rows, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
