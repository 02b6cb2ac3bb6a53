"""Tests of paths and overrides: the fields they name, and the errors of invalid ones."""

from __future__ import annotations

import pytest

from snapgen.architecture.block_index import with_explicit_layers
from snapgen.architecture.overrides import apply_overrides, resolve_path
from tests.snapgen.nets import tiny


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("qk_norm", [("qk_norm",)]),
        ("mid.num_kv_heads", [("mid", "num_kv_heads")]),
        ("time.hidden_dim", [("time", "hidden_dim")]),
        ("down[0].channels", [("down", 0, "channels")]),
        ("up[-1].channels", [("up", 2, "channels")]),
        ("up[1:].conv", [("up", 1, "conv"), ("up", 2, "conv")]),
        ("down[:-1].conv", [("down", 0, "conv"), ("down", 1, "conv")]),
        ("mid.layers[1].num_transformers", [("mid", "layers", 1, 1)]),
        ("levels[0].layers[2].num_res_blocks", [("down", 0, "layers", 2, 0), ("up", 0, "layers", 2, 0)]),
        ("levels[1].conv", [("down", 1, "conv"), ("up", 1, "conv")]),
        ("down.conv", [("down", i, "conv") for i in range(3)]),
        ("all.conv", [(way, i, "conv") for way in ("down", "up") for i in range(3)] + [("mid", "conv")]),
    ],
)
def test_a_path_names_its_fields(path: str, fields: list[tuple[str | int, ...]]) -> None:
    assert resolve_path(path, 3) == fields


@pytest.mark.parametrize(
    "path",
    [
        *("", "down", "mid", "time", "nothing", "down[3].channels", "down[-4].channels", "up[3:].conv", "mid.channels"),
        *("all.channels", "all[0].conv", "mid[0].conv", "down[0].nothing", "down[x].conv", "a.b.c", "down[0].conv[0]"),
        *("down[0]", "qk_norm[0]", "time.conv", "levels..conv", "down[0:3:2].conv"),
        *(
            "mid.layers.num_transformers",
            "mid.layers[-1].num_transformers",
            "mid.layers[0:1].num_transformers",
        ),
        *(
            "mid.layers[0].conv",
            "time.layers[0].num_transformers",
            "mid.layers[0].num_transformers[0]",
            "down[3].layers[0].num_transformers",
        ),
    ],
)
def test_a_path_that_names_nothing_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="; "):
        resolve_path(path, 3)


def test_later_changes_win_and_the_base_stays() -> None:
    base = tiny()
    arch = apply_overrides(base, {"all.conv": "separable", "mid.conv": "standard", "levels[0].expansion": 2})
    assert [blocks.conv for _, blocks, _ in arch.named_levels()] == [
        "separable",
        "separable",
        "standard",
        "separable",
        "separable",
    ]
    assert (arch.down[0].expansion, arch.down[1].expansion) == (2, 1)
    assert base == tiny()


def test_an_impossible_result_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_groups"):
        apply_overrides(tiny(), {"down[0].channels": 9})


def test_a_layers_blocks() -> None:
    base = with_explicit_layers(tiny())
    arch = apply_overrides(base, {"mid.layers[0].num_transformers": 2, "down.layers[0].num_res_blocks": 0})
    assert arch.mid.layers == ((1, 2), *base.mid.layer_counts(is_mid=True)[1:])
    assert arch.mid.num_transformers == sum(count for _, count in arch.mid.layers)
    assert [level.layer_counts()[0][0] for level in arch.down] == [0, 0]
    with pytest.raises(
        ValueError, match=r"the layers of mid are not written out; give it layers, or name mid\.num_trans"
    ):
        apply_overrides(tiny(), {"mid.layers[0].num_transformers": 2})
    with pytest.raises(ValueError, match=r"down\[1\] has no layer 7; use indices from 0 to"):
        apply_overrides(base, {"down[1].layers[7].num_transformers": 2})
