"""Block latency tables: latencies of blocks and sub-networks, tolerances, and rejected tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archsearch.block_latency import table as block_table
from archsearch.block_latency.fitting import fit_block_table
from archsearch.block_latency.table import BlockTable, NetTiming
from archsearch.score import LatencyRecord
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.summing import FIXED, NET, ONCE, UNCHECKED, Fake, cost
from tests.records import latency_record
from tests.snapgen.nets import tiny


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = fit_block_table(Fake(), NET, 8, 5, ONCE)
    (tmp_path / "table.json").write_text(table.to_json())
    assert BlockTable.load(tmp_path / "table.json") == table


@pytest.mark.parametrize("correction", [None, "refit", "curve"])
def test_an_older_table_is_read_without_its_curve(correction: str | None) -> None:
    table = fit_block_table(Fake(), NET, 8, 5, ONCE)
    errors = {"errors": [0.2, -0.1]}
    old = json.loads(table.to_json()) | {"scale": 1.1, "power": 0.9, "tried": {"refit": errors, "curve": errors}}
    read = BlockTable.model_validate(old | ({"correction": correction} if correction else {}))
    assert read.tried.keys() == {"refit"}
    assert read.correction == (correction if correction == "refit" else None)
    assert read.predict(NET) == table.predict(NET)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"chip": "another chip"}, "different conditions: a chip and another chip"),
        ({"architecture": tiny({"mid.layers": [[1, 0]]})}, "costs do not match the architecture's blocks"),
        ({"costs": []}, "at least 1"),
    ],
    ids=["conditions", "architecture", "no costs"],
)
def test_what_does_not_belong_together_is_refused(wrong: dict[str, object], named: str) -> None:
    table = fit_block_table(Fake(), NET, 8, 5, UNCHECKED)
    with pytest.raises(ValueError, match=named):
        BlockTable.model_validate(table.model_dump() | wrong)


def measured(*records: LatencyRecord) -> NetTiming:
    return NetTiming(what="", use="fill", architecture_id="", counts=(), records=records)


def test_a_time_is_as_sure_as_its_records() -> None:
    wide = latency_record(2.0, lower_quartile_ms=1.5, upper_quartile_ms=2.5, runs=25)
    assert measured(latency_record(2)).tolerance == block_table.MIN_TOLERANCE
    assert measured(wide).tolerance == pytest.approx(0.1)
    assert measured(latency_record(2.1), latency_record(2), latency_record(9)).tolerance == pytest.approx(0.05)
    assert measured(latency_record(2), latency_record(9)).tolerance == block_table.MAX_TOLERANCE
    assert measured(wide.model_copy(update={"runs": 0})).tolerance == block_table.PREDICTED_TOLERANCE


def test_a_block_of_no_cost_has_the_floors_which_grows_with_the_noise() -> None:
    spread = {"lower_quartile_ms": 0.01, "upper_quartile_ms": 20.0, "runs": 3000}
    free = block_index.blocks(NET)[0]

    def ms(arch: Architecture) -> float:
        return FIXED + sum(cost(b) for b in block_index.blocks(arch) if b.block_site != free.block_site)

    table, rough = fit_block_table(Fake(ms), NET, 8, 5, ONCE), fit_block_table(Fake(ms, **spread), NET, 8, 5, ONCE)
    assert table.block_ms(free) == table.floor_ms > 0
    assert rough.block_ms(free) == rough.floor_ms > 3 * table.floor_ms


def test_only_sub_networks_are_predicted() -> None:
    table = fit_block_table(Fake(), NET, 8, 5, UNCHECKED)
    assert (table.before, table.after) == (None, None)
    for other in (tiny({"all.ffn_ratio": 2}), tiny({"down[0].num_transformers": 1})):
        with pytest.raises(InputError, match=f"{other.id} is not a sub-network of the table's net {NET.id}"):
            table.predict(other)
    with pytest.raises(InputError, match=r"has no entry for CA down\[0\]\.0"):
        table.block_ms(BlockRef("", "transformer", "down[0]", 0, 0))
