from __future__ import annotations

import pandas
import pytest

from archsearch.reports.rendering import tables


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", "\t=1", " =1"])
def test_a_spreadsheet_runs_no_cell_of_a_table(cell: str) -> None:
    frame = pandas.DataFrame({"knob": [cell, "fine"], cell: [1, -2.5]})
    header, first, _ = pandas.read_csv(pandas.io.common.StringIO(tables.csv(frame)), header=None, dtype=str).values
    assert first[0] == f"'{cell}"
    assert header[1] == f"'{cell}"


def test_numbers_stay_numbers() -> None:
    frame = pandas.DataFrame({"a": [-1, 2], "b": [-0.123456789, None], "c": ["−1", None]})
    assert tables.csv(frame) == "a,b,c\n-1,-0.123456789,−1\n2,,\n"
    assert tables.csv(frame, "%.3g") == "a,b,c\n-1,-0.123,−1\n2,,\n"
