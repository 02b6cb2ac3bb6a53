"""The presets are the published designs, with the sizes that spaces/README.md lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet

ROOT = Path(__file__).parents[3]
README = (ROOT / "spaces" / "README.md").read_text()


def params(arch: Architecture) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(arch).parameters())


# arXiv 2306.00980's table of SD-1.5's and SnapFusion's blocks, the way up from the lowest resolution to the highest.
TABLE: dict[str, dict[str, Any]] = {
    "sd15": {"num_transformers": ((2, 2, 2), 1, (3, 3, 3)), "num_res_blocks": ((2, 2, 2), 7, (3, 3, 3))},
    "snapfusion": {"num_transformers": ((0, 2, 2), 1, (6, 3, 0)), "num_res_blocks": ((2, 2, 1), 4, (2, 3, 3))},
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("kind", ["num_transformers", "num_res_blocks"])
def test_snapfusions_table_block_for_block(name: str, kind: str) -> None:
    arch = presets.preset(name)
    *down, lowest_down = (getattr(level, kind) for level in arch.down)
    lowest_up, *up = (getattr(level, kind) for level in reversed(arch.up))
    middle = lowest_down + getattr(arch.mid, kind) + lowest_up
    assert (tuple(down), middle, tuple(up)) == TABLE[name][kind]


def test_snapfusion_differs_from_sd15_in_nothing_but_blocks() -> None:
    sd15, snapfusion = presets.preset("sd15"), presets.preset("snapfusion")
    same = {}
    for name, blocks, _ in sd15.named_levels():
        same |= {f"{name}.{kind}": getattr(blocks, kind) for kind in ("num_transformers", "num_res_blocks")}
        same |= {f"{name}.head_dim": blocks.head_dim}
    assert apply_overrides(snapfusion, same).id == sd15.id


@pytest.mark.parametrize("name", presets.NAMES)
def test_the_listed_size(name: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert row.split("|")[3].strip() == f"{params(presets.preset(name)) / 1e6:,.1f} M"
    if name == "snapfusion":
        assert row.split("|")[4].strip() == "848 M"


CUT = {"down[2].layers": ((1, 1), (0, 1)), "up[2].layers": ((1, 2), (0, 2), (1, 2)), "down[3].layers": ((1, 0), (0, 0))}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({**CUT, "mid.layers": ((1, 1), (0, 0)), "up[3].layers": ((1, 0), (0, 0), (1, 0))}, "765.9 M"),
        (
            {
                **CUT,
                "down[2].layers": ((0, 1), (1, 1)),
                "mid.layers": ((1, 1), (0, 0)),
                "up[3].layers": ((1, 0), (0, 0), (1, 0)),
            },
            "773.3 M",
        ),
        ({**CUT, "mid.layers": ((1, 1), (1, 0)), "up[3].layers": ((1, 0), (0, 0), (0, 0))}, "751.1 M"),
    ],
)
def test_the_size_of_the_other_readings(changes: dict[str, Any], size: str) -> None:
    values = presets.preset("sd15").model_dump(mode="json")
    ends: dict[str, Any] = {"down[0].num_transformers": 0, "up[0].num_transformers": 0}
    for path, value in {**ends, **changes}.items():
        site, _, field = path.rpartition(".")
        blocks = values["mid"] if site == "mid" else values[site[:-3]][int(site[-2])]
        blocks[field] = value
    assert f"{params(Architecture.model_validate(values)) / 1e6:.1f} M" == size
    assert size in README


def test_the_size_of_the_division_that_leaves_a_skip() -> None:
    arch = apply_overrides(presets.preset("snapfusion"), {"mid.num_res_blocks": 2, "up[3].num_res_blocks": 1})
    assert f"| 1, 2, 1 | {params(arch) / 1e6:.1f} M |" in README
