"""300 generated malformed inputs: each is one line and exit status 2, soon and in 1 GB, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAX_SECONDS, MAX_MEGABYTES = 60, 1000  # a second or two on an idle machine


def check(count: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.malformed", str(count)]
    lines = folder / "lines"
    with lines.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-1000:]
    given = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(given) == count
    for case in given:
        err = case["err"]
        assert case["status"] == "2", case
        mistakes = err.splitlines()
        assert mistakes, case
        assert len(set(mistakes)) == len(mistakes), case
        for line in mistakes:  # a file with several mistakes has a line each
            assert line.startswith("archsearch: "), case
            assert "; " in line, case
        assert "\x1b" not in err, case
        assert "s3cret" not in err, case
        assert case["seconds"] < MAX_SECONDS, case
        assert case["megabytes"] < MAX_MEGABYTES, case
        assert not case["written"], case


def test_thirty_malformed_inputs(tmp_path: Path) -> None:
    check(30, tmp_path)


@pytest.mark.slow
def test_three_hundred_malformed_inputs(tmp_path: Path) -> None:
    check(300, tmp_path)
