"""Cost: published sizes, and agreement with the counters of torch and fvcore."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from archsearch.cost.counter import cost, count_network, module_cost
from archsearch.cost.meta_device import on_meta_device
from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from benchmarks.decoders import counted
from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet
from tests.snapgen.nets import SD15, inputs, tiny

# The ablation of arXiv 2412.09619, as our own count reproduces it: params in M, GMACs at latents of 128 and of 32.
ROWS: list[tuple[str, dict[str, Any], float, float, float]] = [
    ("0", {}, 632.6, 1268, 69.5),
    ("1", {"levels[0:2].self_attention": False}, 622.1, 1053, 66.1),
    ("2a", {"all.conv": "separable"}, 473.4, 653, 41.1),
    ("2b", {"all.expansion": 2}, 528.4, 761, 47.9),
    ("3", {"all.ffn_ratio": 3}, 462.7, 670, 42.2),
    ("4", {"all.num_kv_heads": 1}, 389.3, 631, 37.0),
    (
        "5",
        {"down[0].num_res_blocks": 0, "down[0].num_transformers": 2, "down[0].self_attention": False},
        389.8,
        651,
        38.3,
    ),
]


def _row(name: str) -> Architecture:
    arch = presets.preset("snapgen-baseline")
    for row, changes, *_ in ROWS:
        arch = apply_overrides(arch, changes)
        if row == name:
            break
    return arch


@pytest.mark.parametrize(("name", "params", "large", "small"), [(row[0], *row[2:]) for row in ROWS])
def test_the_ablation_has_its_published_size(name: str, params: float, large: float, small: float) -> None:
    arch = _row(name)
    at_1024_px, at_256_px = cost(arch, 128), cost(arch, 32)
    assert round(at_1024_px.params / 1e6, 1) == params
    assert abs(at_1024_px.macs / 1e9 - large) <= 0.51
    assert round(at_256_px.macs / 1e9, 1) == small


@pytest.mark.parametrize(("name", "params"), [("snapgen-imagenet", 372), ("snapgen-t2i", 379)])
def test_the_final_designs_have_their_published_size(name: str, params: float) -> None:
    assert cost(presets.preset(name), 32).params / 1e6 == pytest.approx(params, rel=0.005)


def test_the_imagenet_preset_is_the_last_row_of_the_ablation() -> None:
    last = apply_overrides(_row("5"), {"qk_norm": True, "rope": True, "time.projection": "output"})
    assert presets.preset("snapgen-imagenet").id == last.id
    assert presets.preset("snapgen-t2i").id == apply_overrides(last, {"context_dim": 2304}).id


VARIETY: dict[str, Architecture] = {
    "tiny": tiny(),
    "snapgen": tiny(
        {"qk_norm": True, "rope": True, "all.conv": "separable", "all.expansion": 2, "all.num_kv_heads": 1}
    ),
    "gqa": tiny({"all.num_kv_heads": 2, "up[1].num_transformers": 6, "mid.ffn_ratio": 2.5}),
    "no attention": tiny({"all.self_attention": False, "all.cross_attention": False}),
    "spare skips": tiny({"up[0].num_res_blocks": 1, "down[0].num_res_blocks": 0, "down[0].num_transformers": 3}),
    "sd-1.5": Architecture.model_validate(SD15),
}


@pytest.mark.parametrize("arch", VARIETY.values(), ids=VARIETY)
def test_macs_are_half_of_torchs_flops(arch: Architecture) -> None:
    assert 2 * cost(arch, 16, context_tokens=5).macs == sum(_by_torch(arch, 16, 5).values())


def _by_torch(arch: Architecture, size: int, tokens: int) -> dict[str, int]:
    """FLOPs of a pass counted by torch after decomposition: attention is its batched matrix products."""
    net, *inputs = on_meta_device(arch, size, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    flops = {str(operator).removeprefix("aten."): n for operator, n in counter.get_flop_counts()["Global"].items()}
    named = {
        "convolution": flops.pop("convolution"),
        "attention": flops.pop("bmm", 0),
        "linear": flops.pop("mm", 0) + flops.pop("addmm", 0),
    }
    assert not flops, "torch counts further operators"
    return named


def _agrees_with_torch(space: Space, seed: int) -> None:
    """Compare MACs per operator for a random full-size architecture; the meta device makes it cheap."""
    arch = space.architecture(space.sample(random.Random(seed)))
    net, *inputs = on_meta_device(arch, space.latent_size, space.context_tokens)
    counts = count_network(net, *inputs, groups={}).macs
    expected = _by_torch(arch, space.latent_size, space.context_tokens)
    assert counts.keys() <= expected.keys()
    for operator, flops in expected.items():
        assert 2 * counts.get(operator, 0) == pytest.approx(flops, rel=1e-3), f"{operator} of {arch.to_json()}"


@pytest.mark.parametrize("name", shipped("space"))
def test_random_architectures_agree_with_torch_by_operator(name: str) -> None:
    space = load_space(name)
    for seed in range(2):
        _agrees_with_torch(space, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped("space"))
def test_two_hundred_architectures_agree_with_torch_by_operator(name: str) -> None:
    space = load_space(name)
    for seed in range(2, 2 + 200 // len(shipped("space"))):
        _agrees_with_torch(space, seed)


@pytest.mark.parametrize("name", ["tiny", "snapgen", "gqa"])
def test_macs_are_what_fvcore_traces_on_the_cpu(name: str) -> None:
    arch = VARIETY[name]
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    analysis = FlopCountAnalysis(UNet(arch), inputs(arch, batch=1, size=16, tokens=5))
    with torch.no_grad():
        counts = analysis.by_operator()
    attention = cost(arch, 16, context_tokens=5).macs - counts["conv"] - counts["linear"]
    assert attention == _attention_macs(arch, size=16, tokens=5)


def _attention_macs(arch: Architecture, *, size: int, tokens: int) -> int:
    """By hand: 2·N·M·C per block for self- and cross-attention each."""
    total = 0
    for site, blocks, channels in arch.named_levels():
        level = int(site.split("[")[1][0]) if "[" in site else len(arch.down) - 1
        n = (size >> level) ** 2
        sources = n * blocks.self_attention + tokens * blocks.cross_attention
        total += blocks.num_transformers * blocks.transformer_depth * 2 * n * sources * channels
    return total


class _OnMeta(TorchDispatchMode):
    """Asserts that every tensor is on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                assert tensor.is_meta, f"{func} makes {tuple(tensor.shape)} on {tensor.device}"
                self.made += 1
        return result


def test_no_weight_is_allocated() -> None:
    with _OnMeta() as trace:
        assert cost(presets.preset("snapgen-imagenet"), 32).params > 372e6
    assert trace.made > 1000


def test_the_tiny_decoder_has_its_published_size_beside_sd3s() -> None:
    sd3, tiny_decoder = (counted(name, 64) for name in ("SD3", "tiny"))
    assert tiny_decoder.params == pytest.approx(1.38e6, rel=0.01)
    assert sd3.params > 35 * tiny_decoder.params


def test_params_are_those_of_the_built_net() -> None:
    arch = VARIETY["snapgen"]
    assert cost(arch, 8).params == sum(p.numel() for p in UNet(arch).parameters())


# --- activation memory ---


def _peak(net: nn.Module, *shape: int) -> int:
    with torch.device("meta"):
        return module_cost(net.to("meta"), torch.empty(*shape)).activation_bytes


def test_a_chain_holds_two_activations_at_a_time() -> None:
    assert _peak(nn.Sequential(*[nn.SiLU() for _ in range(5)]), 1, 8, 4, 4) == 2 * 2 * 128


def test_the_widest_activation_sets_the_peak() -> None:
    narrow, wide = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)
    assert _peak(nn.Sequential(narrow, nn.SiLU(), wide), 1, 4, 5, 5) == 2 * (32 + 32) * 25


def test_views_and_weights_are_free() -> None:
    assert _peak(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 9))), 1, 4, 3, 3) == 0


def test_what_returns_its_input_is_free_each_time() -> None:
    assert _peak(nn.Sequential(nn.SiLU(), *[nn.Dropout().eval() for _ in range(3)]), 1, 8) == 2 * 8


class _Skip(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x.relu()
        return torch.cat([skip.sin().cos().sin(), skip])


def test_a_skip_is_live_until_its_last_use() -> None:
    assert _peak(_Skip(), 1, 100) == 2 * (100 + 100 + 200)


class _Attend(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_is_fused() -> None:
    assert _peak(_Attend(), 1, 1, 64, 8) == 2 * 64 * 8


def test_activations_grow_with_the_latent() -> None:
    arch = VARIETY["snapgen"]
    small, large = cost(arch, 16).activation_bytes, cost(arch, 32).activation_bytes
    assert 3.5 < large / small < 4.1


class _Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, x)


def test_a_product_without_a_mac_formula_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no MAC formula"):
        _peak(_Unknown(), 4, 4)
