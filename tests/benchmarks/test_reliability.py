"""Short versions of the soak and of the kills, whose long ones are commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kills, soak


@pytest.mark.slow
def test_workers_of_which_some_die_while_server_and_disk_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg", reason="pip install 'archsearch[postgresql]'")
    monkeypatch.chdir(tmp_path)
    try:
        lines = soak.soak(tmp_path, minutes=0.7, workers=6, seconds=1, seed=1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert not [line for line in lines if line.startswith("WRONG")]
    assert any(line.startswith("injected: ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kills.KINDS)
def test_killed_four_times_it_ends_as_if_left_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kills.Killer(kind, tmp_path, seed=3).kill(4).startswith(f"{kind}: 4 kills in ")
