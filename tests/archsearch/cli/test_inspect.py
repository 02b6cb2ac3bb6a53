"""The cost command: its JSON and its table hold the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from archsearch import cli
from archsearch.cost.breakdown import KINDS
from archsearch.cost.counter import cost
from snapgen.architecture import presets
from tests.snapgen.nets import tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """The command's output; the exit status must be 0."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["archsearch", "cost", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    return run


@pytest.mark.parametrize(("name", "params"), [("snapgen-imagenet", 372e6), ("snapgen-t2i", 379e6)])
def test_a_preset_has_its_published_size(run: Any, name: str, params: float) -> None:
    found = json.loads(run(name, "--latent-size", 32, "--json"))
    assert found["total"]["params"] == pytest.approx(params, rel=0.005)
    assert {"name": name, "latent": 32, "context_tokens": 77}.items() <= found.items()
    assert found["architecture_id"] == presets.preset(name).id
    assert list(found["by_stage"]) == [
        *("ends", "time", "down[0]", "down[1]", "down[2]", "mid", "up[2]", "up[1]", "up[0]")
    ]
    assert list(found["by_kind"]) == list(KINDS)


def test_the_tiny_decoder_has_its_published_size(run: Any) -> None:
    found = json.loads(run("tiny-decoder", "--latent-size", 128, "--json"))
    assert found["total"]["params"] == pytest.approx(1.38e6, rel=0.01)
    assert found["image"] == 1024
    assert "context_tokens" not in found


def test_a_file_is_counted_at_the_size_asked_for(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(tiny().to_json())
    found = json.loads(run(path, "--latent-size", 8, "--context-tokens", 3, "--json"))
    whole = cost(tiny(), 8, context_tokens=3).model_dump()
    assert whole.items() <= found["total"].items()


def test_the_table_says_what_the_json_does(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(tiny().to_json())
    found = json.loads(run(path, "--latent-size", 64, "--json"))
    lines = [line.split() for line in run(path, "--latent-size", 64).splitlines()]
    for name, part in [("total", found["total"]), *found["by_stage"].items(), *found["by_kind"].items()]:
        percent = [f"{100 * part[key] / found['total'][key]:.1f}" for key in ("params", "macs")]
        memory = [f"{part[key] / 1e6:.1f}" for key in ("activation_bytes", "written_bytes")]
        counted = f"{part['params'] / 1e6:.3f}", percent[0], f"{part['macs'] / 1e9:.3f}", percent[1]
        assert [*name.split("_"), *counted, *memory] in lines
    for operator in found["macs_by_operator"]:
        assert any(operator in line for line in lines)
