"""Tests of architectures: ids are equal exactly if the nets are, invalid ones are refused, JSON round-trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.snapgen.nets import SD15, same_net, tiny

CHANGES_THE_NET: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"latent_channels": 4}),
    ({}, {"context_dim": 16}),
    ({}, {"norm_groups": 2}),
    ({}, {"qk_norm": True}),
    ({}, {"rope": True}),
    ({}, {"time.embed_dim": 16}),
    ({}, {"time.hidden_dim": 8}),
    ({}, {"time.projection": "output"}),
    ({"all.conv": "separable"}, {"time.projection": "output"}),
    ({}, {"down[0].channels": 16}),
    ({}, {"up[0].channels": 16}),
    ({}, {"down[0].num_res_blocks": 2}),
    ({}, {"up[0].num_res_blocks": 1}),
    ({}, {"up[0].num_res_blocks": 5}),
    ({}, {"mid.num_res_blocks": 1}),
    ({}, {"mid.num_res_blocks": 0}),
    ({}, {"down[0].num_transformers": 1}),
    ({}, {"mid.num_transformers": 0}),
    ({}, {"up[1].num_transformers": 3}),
    ({}, {"up[1].transformer_depth": 2}),
    ({}, {"mid.transformer_depth": 0}),
    ({}, {"down[1].self_attention": False}),
    ({}, {"up[1].cross_attention": False}),
    ({}, {"mid.num_kv_heads": 1}),
    ({}, {"mid.num_kv_heads": 2}),
    ({}, {"mid.head_dim": 8}),
    ({}, {"mid.ffn_ratio": 2}),
    ({}, {"mid.ffn_ratio": 3.5}),
    ({}, {"down[0].conv": "separable"}),
    ({}, {"mid.conv": "separable"}),
    ({"all.conv": "separable"}, {"mid.expansion": 2}),
    ({"all.conv": "separable"}, {"up[0].expansion": 1.5}),
    ({"down[0].num_res_blocks": 0, "down[0].num_transformers": 1}, {"down[0].conv": "separable"}),
]

CHANGES_NOTHING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"all.expansion": 3}),
    ({}, {"down[0].num_kv_heads": 1}),
    ({}, {"down[0].head_dim": 8}),
    ({}, {"down[0].ffn_ratio": 2}),
    ({}, {"down[0].self_attention": False}),
    ({}, {"down[0].cross_attention": False}),
    ({}, {"down[0].transformer_depth": 3}),
    ({}, {"mid.num_kv_heads": 4}),
    ({"mid.transformer_depth": 0}, {"mid.num_transformers": 7}),
    ({"mid.num_res_blocks": 0}, {"mid.conv": "separable"}),
    ({"down[1].num_res_blocks": 0}, {"down[1].conv": "separable"}),
    (
        {"down[0].num_res_blocks": 0, "down[0].num_transformers": 1, "down[0].conv": "separable"},
        {"down[0].expansion": 2},
    ),
    ({"all.self_attention": False}, {"rope": True}),
    ({"all.self_attention": False, "all.cross_attention": False}, {"qk_norm": True}),
    ({"all.self_attention": False, "all.cross_attention": False}, {"all.num_kv_heads": 1, "all.head_dim": 8}),
    ({}, {"mid.ffn_ratio": 4.0000001}),
]


@pytest.mark.parametrize(("first", "change"), CHANGES_THE_NET, ids=lambda c: ",".join(c))
def test_a_knob_that_changes_the_net_changes_the_id(first: dict[str, Any], change: dict[str, Any]) -> None:
    base = tiny(first)
    changed = apply_overrides(base, change)
    assert not same_net(base, changed)
    assert base.id != changed.id


@pytest.mark.parametrize(("first", "change"), CHANGES_NOTHING, ids=lambda c: ",".join(c))
def test_a_knob_that_changes_nothing_keeps_the_id(first: dict[str, Any], change: dict[str, Any]) -> None:
    base = tiny(first)
    changed = apply_overrides(base, change)
    assert base != changed
    assert same_net(base, changed)
    assert base.id == changed.id


def test_a_context_width_without_cross_attention_keeps_the_id() -> None:
    base = tiny({"all.cross_attention": False})
    assert base.id == apply_overrides(base, {"context_dim": 99}).id


KNOBS: dict[str, list[Any]] = {
    "qk_norm": [True, False],
    "rope": [True, False],
    "time.projection": ["expanded", "output"],
    "all.conv": ["standard", "separable"],
    "all.expansion": [1, 1.5, 2],
    "down[0].num_res_blocks": [0, 1, 2],
    "down[0].num_transformers": [1, 2],
    "mid.num_res_blocks": [0, 1, 2, 3],
    "levels[1].num_transformers": [0, 1, 2, 3],
    "mid.num_transformers": [0, 1, 2],
    "all.transformer_depth": [0, 1, 2],
    "levels[0].self_attention": [True, False],
    "all.cross_attention": [True, False],
    "up[0].num_res_blocks": [1, 2, 4],
    "all.num_kv_heads": [None, 1, 2],
    "mid.head_dim": [4, 8],
    "mid.ffn_ratio": [1, 2.5],
}


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    changes = {path: draw(st.sampled_from(values)) for path, values in KNOBS.items()}
    if changes["all.transformer_depth"] == 0:
        changes["down[0].num_res_blocks"] = max(1, changes["down[0].num_res_blocks"])
    return tiny(changes)


@settings(max_examples=15, deadline=None)
@given(architectures(), st.sampled_from(sorted(KNOBS)), st.data())
def test_ids_are_equal_exactly_when_the_nets_are(base: Architecture, path: str, data: st.DataObject) -> None:
    try:
        changed = apply_overrides(base, {path: data.draw(st.sampled_from(KNOBS[path]))})
    except ValueError:
        return  # e.g. a level without blocks
    assert same_net(base, base.canonical())
    assert (base.id == changed.id) == same_net(base, changed)


def test_canonical_is_its_own_canonical() -> None:
    arch = tiny({"all.expansion": 2, "mid.num_kv_heads": 4})
    assert arch.canonical().canonical() == arch.canonical() != arch


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_survive_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    path.write_text(presets.preset(name).to_json())
    assert presets.resolve(str(path)) == presets.resolve(name) == presets.preset(name)


@pytest.mark.parametrize("name", ["snapgen", "", "no/such.yaml", "."])
def test_resolve_refuses_unknown_names(name: str) -> None:
    with pytest.raises(InputError):
        presets.resolve(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down[0].channels": 9}, "down[0] has 9 channels"),
        ({"mid.head_dim": 5}, "head_dim 5"),
        ({"mid.num_kv_heads": 3}, "3 num_kv_heads"),
        ({"mid.head_dim": 16, "mid.num_kv_heads": 2}, "2 num_kv_heads"),
        ({"down[0].num_res_blocks": 0}, "down[0] has no blocks"),
        ({"up[1].num_res_blocks": 0}, "up[1] has no residual block"),
        ({"all.conv": "separable", "mid.expansion": 1.1}, "expansion 1.1 of 16"),
        ({"all.conv": "separable", "up[0].expansion": 1.125}, "up[0] expands 24 channels to 27"),
        ({"mid.ffn_ratio": 2.1}, "ffn_ratio 2.1 of 16"),
        ({"rope": True, "all.head_dim": 8, "mid.head_dim": 2}, "head_dim"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        tiny(changes)


def test_up_and_down_must_pair() -> None:
    with pytest.raises(ValueError, match="same number"):
        Architecture.model_validate({**SD15, "up": SD15["up"][:3]})  # type: ignore[index]


def test_skips_are_those_of_diffusers() -> None:
    arch = Architecture.model_validate(SD15)
    assert [arch.skip_channels(i) for i in range(4)] == [[320] * 3, [320, 640, 640], [640, 1280, 1280], [1280] * 3]
    assert [arch.up_in_channels(i) for i in range(4)] == [
        [640 + 320, 640, 640],
        [1280 + 640, 640 + 640, 640 + 320],
        [2560, 2560, 1280 + 640],
        [2560, 2560, 2560],
    ]
    assert arch.stride == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 10**15}, "latent_channels"),
        ({"context_dim": 10**30}, "context_dim"),
        ({"norm_groups": 10**9}, "norm_groups"),
        ({"time": {"embed_dim": 10**12}}, "embed_dim"),
        ({"time": {"hidden_dim": 10**12}}, "hidden_dim"),
        ({"mid": {"head_dim": 10**9}}, "head_dim"),
        ({"mid": {"num_kv_heads": 10**9}}, "num_kv_heads"),
        ({"mid": {"num_res_blocks": 1, "num_transformers": 5, "transformer_depth": 64}}, "use 256 or fewer"),
    ],
)
def test_dimensions_have_upper_bounds(changes: dict[str, Any], words: str) -> None:
    """A net is built on the meta device to be counted, where every block takes time and sizes can overflow."""
    level = {"channels": 64, "num_res_blocks": 1}
    with pytest.raises(ValueError, match=words):
        Architecture.model_validate({"down": [level], "up": [level], **changes})
