"""Fitting of block latency tables: recovers known latencies, detects where sums fail, and resumes."""

from __future__ import annotations

import numpy as np
import pytest

from archsearch.block_latency import fitting
from archsearch.block_latency.config import BlockTableConfig
from archsearch.block_latency.fitting import fit_block_table
from archsearch.block_latency.table import TOLERATED
from archsearch.cost.operations import operations
from archsearch.devices import backend
from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.seeding import derive_seed
from tests.archsearch.summing import FIXED, NET, ONCE, UNCHECKED, Fake, added, biased, cost, crowded
from tests.records import latency_record
from tests.snapgen.nets import tiny

TWICE = tiny({"mid.layers": [[1, 2], [2, 0]]})
"""A net with two blocks at some sites."""
LONE = block_index.edit_blocks(NET, [block.name for block in block_index.blocks(NET)[1:]])
"""A net with one block."""


@pytest.mark.parametrize("arch", [NET, TWICE], ids=["one a place", "two in some"])
def test_sums_give_their_parts_back(arch: Architecture) -> None:
    table = fit_block_table(Fake(), arch, 8, 5, ONCE)
    assert table.fixed_ms == pytest.approx(FIXED, abs=0.01)
    for block in block_index.blocks(block_index.edit_blocks(arch, copied=[b.name for b in block_index.blocks(arch)])):
        assert table.block_ms(block) == pytest.approx(cost(block), rel=0.02), block.label
    assert table.predict(arch) == pytest.approx(added(arch), rel=0.005)
    assert table.before is not None
    assert table.before.largest < 0.01
    assert table.before.within == 1
    assert (table.after, table.correction, table.tried) == (None, None, {})


def test_every_net_is_another_and_the_whole_is_the_first() -> None:
    clock = Fake()
    table = fit_block_table(clock, NET, 8, 5, ONCE)
    places = len(table.costs)
    assert clock.asked[0] == NET.id
    assert len(set(clock.asked)) == len(clock.asked) == len(table.measured) == 2 + 2 * places + 6
    assert [net.architecture_id for net in table.measured] == clock.asked
    assert table.whole_ms == table.measured[0].ms == pytest.approx(added(NET))


def test_more_sub_networks_begin_with_the_same_ones() -> None:
    def checked(**changes: int) -> list[str]:
        table = fit_block_table(Fake(), NET, 8, 5, ONCE.model_copy(update=changes))
        return [net.architecture_id for net in table.measured if net.use == "check"]

    assert checked(check=8)[:6] == checked()
    assert checked(seed=1) != checked()


def test_sub_networks_differ_in_size_and_some_have_copies() -> None:
    table = fit_block_table(Fake(), NET, 8, 5, BlockTableConfig(validation_nets=20, min_repeats=1))
    totals = [sum(net.counts) for net in table.measured if net.use == "check"]
    assert max(totals) > min(totals) + 5
    assert any(max(net.counts) > 1 for net in table.measured if net.use == "check")


def test_the_check_sees_what_is_no_sum() -> None:
    table = fit_block_table(Fake(crowded), NET, 8, 5, BlockTableConfig(validation_nets=20, min_repeats=1))
    assert table.before is not None
    assert table.after is not None
    assert TOLERATED < table.before.largest <= table.after.largest
    assert table.correction is None


def test_a_refit_helps_where_a_net_was_timed_badly() -> None:
    table = fit_block_table(Fake(biased), NET, 8, 5, BlockTableConfig(validation_nets=20, min_repeats=1))
    assert table.before is not None
    assert table.after is not None
    assert table.before.largest > TOLERATED
    assert table.correction == "refit"
    assert table.after.largest < table.before.largest
    assert table.after.median < table.before.median
    parts = sum(table.block_ms(block) for block in block_index.blocks(NET)) + table.fixed_ms
    assert parts == pytest.approx(table.predict(NET), rel=0.01)
    fresh = [net for _, use, net in fitting._planned_nets(NET, BlockTableConfig(seed=1)) if use == "check"]
    errors = [abs(table.predict(net) / biased(net) - 1) for net in fresh]
    assert max(errors) < table.before.largest, "on nets that neither fit had"
    assert np.median(errors) < table.before.median


def test_a_correction_that_does_no_better_is_not_made() -> None:
    def coin(arch: Architecture) -> float:
        return 2.0 if derive_seed(1, arch.id) % 2 else 1.0

    table = fit_block_table(Fake(coin), NET, 8, 5, ONCE)
    assert table.before is not None
    assert table.tried.keys() == {"refit"}
    better = [name for name, check in table.tried.items() if check.largest < table.before.largest]
    assert (table.correction is None) == (not better)


def test_disturbed_measurements_are_repeated_and_the_lowest_counts() -> None:
    rng = np.random.default_rng(0)

    def disturbed(arch: Architecture) -> float:
        return added(arch) * (1 + (rng.random() < 0.4) * rng.uniform(0.2, 1)) * rng.uniform(1, 1.01)

    clock = Fake(disturbed)
    table = fit_block_table(clock, NET, 8, 5, BlockTableConfig(validation_nets=10))
    assert table.before is not None
    assert table.before.largest < 0.1
    assert len(clock.asked) > 3 * len(table.measured)
    assert sum(len(net.records) for net in table.measured) == len(clock.asked), "all records are stored"
    assert clock.asked[: len(table.measured)] == [net.architecture_id for net in table.measured], "they take turns"


def test_a_killed_fill_goes_on() -> None:
    existing: dict[str, list[LatencyRecord]] = {}

    def save(arch: Architecture, record: LatencyRecord) -> None:
        existing.setdefault(arch.id, []).append(record)

    def once_more(arch: Architecture) -> float:
        if len(clock.asked) == 30:
            raise KeyboardInterrupt
        return added(arch)

    clock = Fake(once_more)
    options = BlockTableConfig(validation_nets=4, min_repeats=2)
    with pytest.raises(KeyboardInterrupt):
        fit_block_table(clock, NET, 8, 5, options, existing=existing, save=save)
    rest = Fake()
    resumed = fit_block_table(rest, NET, 8, 5, options, existing=existing, save=save)
    assert sum(map(len, existing.values())) == 29 + len(rest.asked) == 2 * len(resumed.measured)
    assert (
        fit_block_table(idle := Fake(), NET, 8, 5, options, existing=existing)
        == resumed
        == fit_block_table(Fake(), NET, 8, 5, options)
    )
    assert idle.asked == []


def test_predictions_are_taken_once_and_their_sums_are_checked() -> None:
    timer = backend("predicted:iphone-16-pro-max")
    told: list[float] = []
    table = fit_block_table(timer, NET, 8, 5, BlockTableConfig(validation_nets=5), progress=told.append)
    assert table.source == "predicted"
    assert all(len(net.records) == 1 for net in table.measured)
    assert table.before is not None
    assert table.before.largest < 0.02, "a prediction is a sum of operations"
    assert table.predict(NET) == pytest.approx(table.whole_ms, rel=0.01)
    assert told[-1] == 1
    heavier = max(block_index.blocks(NET), key=table.block_ms)
    saved = operations_of(NET) - operations_of(block_index.edit_blocks(NET, [heavier.name]))
    assert saved > 0


def operations_of(arch: Architecture) -> int:
    return len(operations(arch, 8, context_tokens=5))


@pytest.mark.parametrize(
    ("arch", "latent", "options", "named"),
    [
        (block_index.edit_blocks(NET, [b.name for b in block_index.blocks(NET)]), 8, ONCE, "has no block; give it"),
        (NET, 7, ONCE, "multiple of 2"),
        (
            LONE,
            8,
            BlockTableConfig(validation_nets=2, min_repeats=1),
            "only 1 sub-networks are left for validation, 2 were requested",
        ),
    ],
    ids=["no block", "latent", "sub-networks"],
)
def test_bad_input_is_an_error(arch: Architecture, latent: int, options: BlockTableConfig, named: str) -> None:
    with pytest.raises(InputError, match=named):
        fit_block_table(Fake(), arch, latent, 5, options)


@pytest.mark.parametrize("wrong", [{"extra_copies": 0}, {"validation_nets": -1}, {"min_repeats": 0}])
def test_bad_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than or equal"):
        BlockTableConfig(**wrong)


def test_records_of_another_device_are_refused() -> None:
    existing = {NET.id: [latency_record(1, chip="another chip")]}
    clock = Fake()
    with pytest.raises(InputError, match="different conditions: a chip and another chip"):
        fit_block_table(clock, NET, 8, 5, UNCHECKED, existing=existing)
    assert len(clock.asked) == 1
    both = {NET.id: [*existing[NET.id], latency_record(1)]}
    with pytest.raises(InputError, match="different conditions"):
        fit_block_table(clock, NET, 8, 5, UNCHECKED, existing=both)


def test_a_net_that_can_not_be_timed_ends_the_fill() -> None:
    def fails(_: Architecture) -> float:
        raise MeasurementError("out of memory")

    with pytest.raises(MeasurementError, match="out of memory"):
        fit_block_table(Fake(fails), NET, 8, 5, ONCE)
