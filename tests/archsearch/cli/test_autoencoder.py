"""The command train-autoencoder hands its options on, and names what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from archsearch import cli
from snapgen.autoencoders import train_to_folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command's status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["archsearch", "train-autoencoder", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return (ended.value.code, *capsys.readouterr())

    return run


def test_options_are_handed_on_and_the_result_is_one_line(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stand_in(out: Path, **options: Any) -> dict[int, str]:
        given.update(out=out, **options)
        options["log"]("a line")
        return {32: "30 dB", 64: "29 dB"}

    monkeypatch.setattr(train_to_folder, "train_to_folder", stand_in)
    status, out, _ = run("--out", tmp_path, "--steps", 3, "--resolutions", "32, 64", "--seed", 4)
    assert (status, out) == (0, f"a line\n{tmp_path}: 32 px 30 dB; 64 px 29 dB\n")
    asked = {"out": tmp_path, "steps": 3, "resolutions": (32, 64), "seed": 4, "data": "emoji", "encoder": None}
    assert asked.items() <= given.items()
    assert run("--out", tmp_path, "--quiet")[1].count("\n") == 1


@pytest.mark.parametrize("sides", ["", "32;64", "8", "32,-64", "²"])
def test_sides_that_are_none_are_named(run: Any, sides: str, tmp_path: Path) -> None:
    status, _, err = run("--out", tmp_path / "out", f"--resolutions={sides}")
    assert status == 2
    assert "--resolutions" in err
    assert not (tmp_path / "out").exists()
