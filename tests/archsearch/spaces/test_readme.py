"""The worked example in spaces/README.md is a space, and its table of shipped spaces is correct."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.spaces.summary import _params
from snapgen.architecture import presets
from snapgen.errors import InputError

ROOT = Path(__file__).parents[3]
README = (ROOT / "spaces" / "README.md").read_text()


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert match
    return match[1]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "thin.yaml"
    path.write_text(block("yaml"))
    return path


def test_the_worked_example(example: Path) -> None:
    space = load_space(example)
    assert space.base.id == presets.preset("snapgen-imagenet").id
    assert space.size() == 3 * 3 * 2 * 2 * 2
    assert [knob.name for knob in space.knobs if knob.ordered] == ["levels[2].channels", "all.num_kv_heads"]
    thin = space.architecture(space.references["thin and shallow"])
    assert (thin.down[2].channels, thin.mid.transformer_depth, thin.up[2].transformer_depth) == (640, 2, 2)
    sizes = {name: _params(space.architecture(point)) for name, point in space.reference_points().items()}
    assert sizes["thin and shallow"] < sizes["base"] < space.constraints["params"]


def test_the_shown_mistake(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example.write_text(example.read_text().replace("  qk_norm:", "  all.ffn_ratio: [3, '3']\n  qk_norm:"))
    monkeypatch.chdir(example.parent)
    with pytest.raises(InputError) as raised:
        load_space("thin.yaml")
    assert str(raised.value) in README


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python"), "README.md", "exec"), {})
    assert "'convs': " in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped("space"))
def test_the_table_of_shipped_spaces(name: str) -> None:
    space = load_space(name)
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
    grid = f"{space.latent_size}×{space.latent_size}×{space.base.latent_channels}"
    cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
    assert cells == [grid, f"{space.size():,}", f"{_params(space.base) / 1e6:.{2 if name == 'emoji' else 1}f} M"]
