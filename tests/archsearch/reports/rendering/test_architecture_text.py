from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from archsearch.reports.rendering.architecture_text import aspects, describe, differences
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture


def small(**changes: Any) -> Architecture:
    def level(channels: int) -> dict[str, Any]:
        return {"channels": channels, "num_res_blocks": 1, "num_transformers": 1, "head_dim": 16}

    arch = Architecture(
        norm_groups=16,
        down=[level(32), level(64), level(96)],
        mid={"num_transformers": 1, "head_dim": 16},
        up=[level(32), level(64), level(96)],
    )
    return apply_overrides(arch, {path.replace("__", "."): value for path, value in changes.items()})


def with_changes(changes: dict[str, Any]) -> Architecture:
    return apply_overrides(small(), changes)


def test_one_line_for_snapgens_choices() -> None:
    arch = with_changes(
        {
            "levels[0:2].self_attention": False,
            "all.conv": "separable",
            "all.expansion": 2,
            "all.num_kv_heads": 1,
            "all.ffn_ratio": 3,
            "qk_norm": True,
            "rope": True,
        }
    )
    assert describe(arch) == (
        "3 levels 32-64-96; residual blocks 1 down, 2 mid, 1 up; transformers 1 down, 1 mid, 1 up; "
        "self-attention at the lowest level only; cross-attention everywhere; separable convs ×2; MQA; FFN ×3; "
        "QK-norm; RoPE"
    )


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"all.self_attention": False}, "no self-attention"),
        ({"levels[2].self_attention": False}, "self-attention at levels 1–2 and in the middle only"),
        ({"levels.self_attention": False}, "self-attention in the middle only"),
        (
            {"up.self_attention": False, "mid.self_attention": False},
            "self-attention on the way down at levels 1–3 only",
        ),
        ({"levels[1].self_attention": False}, "self-attention at levels 1, 3 and in the middle only"),
        (
            {"up[1].num_kv_heads": 2},
            "GQA (2 kv heads) on the way up at level 2; MHSA at levels 1, 3, on the way down at level 2 "
            "and in the middle",
        ),
        ({"up[1].channels": 128}, "3 levels 32-64-96 down, 32-128-96 up"),
        ({"down[1].transformer_depth": 4}, "transformers 1-1×4-1 down"),
        ({"all.num_transformers": 0}, "no transformers"),
        ({"up[1].layers": [[1, 0], [0, 2]]}, "layers of 1+0, 0+2 on the way up at level 2"),
        ({"levels[0].num_transformers": 0}, "cross-attention everywhere"),
    ],
)
def test_sites_are_described(changes: dict[str, Any], phrase: str) -> None:
    assert phrase in describe(with_changes(changes))


def test_differences_name_both_sides() -> None:
    arch = with_changes({"all.ffn_ratio": 3, "rope": True, "mid.head_dim": 32})
    assert differences(arch, small()) == [
        "FFN ×3 (base: FFN ×4)",
        "RoPE (base: no RoPE)",
        "heads of 16 at levels 1–3; heads of 32 in the middle (base: heads of 16)",
    ]
    assert differences(small(), small()) == []


def test_a_knob_without_effect_is_not_a_difference() -> None:
    plain = with_changes({"all.expansion": 2})
    assert differences(plain, small()) == []


FIELDS: dict[str, list[Any]] = {
    "num_res_blocks": [1, 2],
    "num_transformers": [0, 1, 2],
    "transformer_depth": [1, 3],
    "self_attention": [True, False],
    "cross_attention": [True, False],
    "num_kv_heads": [None, 1, 2],
    "head_dim": [16, 8],
    "ffn_ratio": [3, 4],
    "conv": ["standard", "separable"],
    "expansion": [1, 2],
}
GLOBAL_FIELDS: dict[str, list[Any]] = {
    "latent_channels": [4, 16],
    "context_dim": [32, 64],
    "norm_groups": [8, 16],
    "qk_norm": [True, False],
    "rope": [True, False],
    "time.embed_dim": [64, 128],
    "time.hidden_dim": [64, 128],
    "time.projection": ["expanded", "output"],
    "down[2].channels": [96, 128],
    "up[0].channels": [32, 64],
    "down[1].num_res_blocks": [0, 1],
    "up[1].layers": [None, [[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1]]],
    "mid.layers": [None, [[1, 1], [1, 0]], [[2, 1], [0, 0]]],
}
SITES = ["mid", "down[0]", "down[1]", "down[2]", "up[0]", "up[1]", "up[2]", "levels[0:2]", "all"]


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    keys = {f"{site}.{field}": values for site in SITES for field, values in FIELDS.items()} | GLOBAL_FIELDS
    names = draw(st.lists(st.sampled_from(sorted(keys)), max_size=4))
    try:
        return with_changes({name: draw(st.sampled_from(keys[name])) for name in names})
    except ValueError:
        return small()


@given(architectures(), architectures())
@settings(max_examples=400, deadline=None)
def test_descriptions_differ_exactly_if_the_networks_differ(a: Architecture, b: Architecture) -> None:
    assert (aspects(a) == aspects(b)) == (a.id == b.id)
    assert bool(differences(a, b)) == (a.id != b.id)
