"""The breakdown: items add up to the total and agree with counts that do not use groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from archsearch.cost.breakdown import KINDS, Breakdown, breakdown, decoder_breakdown
from archsearch.cost.counter import Cost, CostItem, cost, count_network, module_cost
from archsearch.cost.meta_device import on_meta_device
from snapgen.architecture import presets
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder
from snapgen.models.layers import Attention, GEGLUFeedForward, ResidualBlock
from snapgen.models.unet import UNet
from tests.snapgen.nets import SD15, tiny

SIZE, TOKENS = 16, 5
ARCHITECTURES: dict[str, Architecture] = {
    "tiny": tiny(),
    "snapgen": tiny(
        {"qk_norm": True, "rope": True, "all.conv": "separable", "all.expansion": 2, "all.num_kv_heads": 1}
    ),
    "no attention": tiny({"all.self_attention": False, "all.cross_attention": False}),
    "no middle": tiny({"mid.num_res_blocks": 0, "mid.num_transformers": 0}),
    "widened": tiny({"down[1].num_res_blocks": 0, "down[1].num_transformers": 3, "up[0].num_res_blocks": 1}),
    "sd-1.5": Architecture.model_validate(SD15),
    "snapgen-imagenet": presets.preset("snapgen-imagenet"),
}


def _sum(items: dict[str, CostItem]) -> dict[str, int]:
    columns = {name: [getattr(item, name) for item in items.values()] for name in CostItem.model_fields}
    return {name: (max if name == "activation_bytes" else sum)(values) for name, values in columns.items()}


def _adds_up(result: Breakdown, total_cost: Cost) -> None:
    total = result.total.model_dump()
    assert {name: total[name] for name in Cost.model_fields} == total_cost.model_dump()
    assert _sum(result.by_stage) == _sum(result.by_kind) == total
    assert sum(result.macs_by_operator.values()) == total_cost.macs


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_items_add_up_to_the_total(arch: Architecture) -> None:
    _adds_up(breakdown(arch, SIZE, context_tokens=TOKENS), cost(arch, SIZE, context_tokens=TOKENS))


@pytest.mark.parametrize("mid_blocks", [0, 2])
def test_items_of_a_decoder_add_up(mid_blocks: int) -> None:
    config = {**PAPER, "mid_blocks": mid_blocks}
    with torch.device("meta"):
        total_cost = module_cost(TinyDecoder(**config), torch.empty(1, 16, 8, 8))
    result = decoder_breakdown(config, 8)
    _adds_up(result, total_cost)
    assert list(result.by_stage) == ["ends", *["mid"] * bool(mid_blocks), "up[3]", "up[2]", "up[1]", "up[0]"]


def _params(
    net: nn.Module, included: Callable[[nn.Module], bool], excluded: Callable[[str], bool] = lambda _: False
) -> int:
    modules = [module for module in net.modules() if included(module)]
    return sum(p.numel() for module in modules for name, p in module.named_parameters() if not excluded(name))


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_params_are_those_of_the_modules(arch: Architecture) -> None:
    result = breakdown(arch, SIZE, context_tokens=TOKENS)
    with torch.device("meta"):
        net = UNet(arch)
    modules = {"time": net.time_embedding, "mid": net.mid}
    modules |= {f"{way}[{i}]": stage for way in ("down", "up") for i, stage in enumerate(getattr(net, way))}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    sizes["ends"] = sum(p.numel() for p in [*net.conv_in.parameters(), *net.conv_norm_out.parameters()])
    sizes["ends"] += sum(p.numel() for p in net.conv_out.parameters())
    assert {stage: item.params for stage, item in result.by_stage.items()} == sizes

    kinds = {kind: result.by_kind[kind].params if kind in result.by_kind else 0 for kind in KINDS}
    attention = _params(net, lambda m: isinstance(m, Attention), lambda name: "norm" in name)
    assert kinds["self_attention"] + kinds["cross_attention"] == attention
    assert kinds["feed_forward"] == _params(net, lambda m: isinstance(m, GEGLUFeedForward))
    residual = _params(net, lambda m: isinstance(m, ResidualBlock), lambda name: name.startswith(("norm", "time")))
    assert kinds["residual"] == residual
    assert kinds["norm"] == _params(net, lambda m: isinstance(m, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm))
    assert kinds["other"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_macs_have_a_kind(arch: Architecture) -> None:
    kinds = breakdown(arch, SIZE, context_tokens=TOKENS).by_kind
    assert kinds["other"].macs == kinds["norm"].macs == 0
    assert all(item.macs > 0 for kind, item in kinds.items() if kind not in ("other", "norm"))


def test_each_attention_has_its_own_kind() -> None:
    full = breakdown(tiny(), SIZE, context_tokens=TOKENS).by_kind
    for path, kind in (("all.self_attention", "self_attention"), ("all.cross_attention", "cross_attention")):
        without = breakdown(tiny({path: False}), SIZE, context_tokens=TOKENS).by_kind
        assert kind in full
        assert kind not in without
        assert full.keys() - without.keys() == {kind}
        unmoved = set(without) - {"norm", "other"}  # each attention has a norm and an addition
        assert all(full[name].macs == without[name].macs for name in unmoved)
        assert all(full[name].written_bytes == without[name].written_bytes for name in unmoved)


def test_only_the_context_makes_cross_attention_longer() -> None:
    short, long = (breakdown(tiny(), SIZE, context_tokens=tokens).by_kind for tokens in (5, 50))
    changed = {kind for kind in short if short[kind].macs != long[kind].macs}
    assert changed == {"cross_attention"}


def test_memory_by_group_by_hand() -> None:
    """4 → 32 → 32 → 4 channels of 25 positions in fp16; each layer's input is live until the layer ends."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(4, 32, 1), nn.SiLU(), nn.Conv2d(32, 4, 1), nn.Flatten())
        groups = dict(zip(net, ("wide", "wide", "narrow", "flat"), strict=True))
        by_group = count_network(net, torch.empty(1, 4, 5, 5), groups=groups).by_group
    by_name = {group: (item.activation_bytes, item.written_bytes) for group, item in by_group.items()}
    assert by_name == {
        "wide": (2 * 64 * 25, 2 * 64 * 25),
        "narrow": (2 * 36 * 25, 2 * 4 * 25),
        "flat": (2 * 4 * 25, 0),
    }


def test_the_innermost_group_decides_and_shared_weights_count_once() -> None:
    with torch.device("meta"):
        shared = nn.Linear(6, 6, bias=False)
        inner = nn.Sequential(shared)
        net = nn.Sequential(inner, nn.SiLU(), nn.Sequential(shared))
        result = count_network(net, torch.empty(1, 6), groups={inner: "inner", net: "outer"})
    assert {group: (item.params, item.macs) for group, item in result.by_group.items()} == {
        "inner": (36, 36),
        "outer": (0, 36),
    }
    assert result.macs == {"linear": 72}


def test_a_count_leaves_the_net_as_it_was() -> None:
    net, *inputs = on_meta_device(tiny(), SIZE, TOKENS)
    before = count_network(net, *inputs, groups=dict.fromkeys(net.modules(), "all"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert count_network(net, *inputs, groups=dict.fromkeys(net.modules(), "all")) == before


def test_a_failed_pass_removes_its_hooks() -> None:
    net, sample, time, context = on_meta_device(tiny(), SIZE, TOKENS)
    with pytest.raises(ValueError, match="multiples of 2"):
        count_network(net, sample[..., :3], time, context, groups=dict.fromkeys(net.modules(), "all"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
