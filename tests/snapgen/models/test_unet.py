"""Tests of the U-Net; tests of the conversion compare it with diffusers' nets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from snapgen import devices
from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture, BlocksConfig
from snapgen.diffusion.process import make_process
from snapgen.errors import InputError
from snapgen.models import layers
from snapgen.models.layers import Attention
from snapgen.models.unet import Layer, UNet, check_memory
from tests.snapgen.nets import SD15, inputs, stirred, tiny

SNAPGEN: dict[str, Any] = {  # the paper's choices, small
    "qk_norm": True,
    "rope": True,
    "time.projection": "output",
    "all.conv": "separable",
    "all.expansion": 2,
    "all.ffn_ratio": 3,
    "all.num_kv_heads": 1,
    "down[0].num_res_blocks": 0,
    "down[0].num_transformers": 2,
    "levels[0].self_attention": False,
}

VARIETY: dict[str, dict[str, Any]] = {
    "tiny": {},
    "snapgen": SNAPGEN,
    "gqa": {"all.num_kv_heads": 2, "rope": True},
    "no attention": {"all.self_attention": False, "all.cross_attention": False},
    "no middle": {"mid.num_res_blocks": 0, "mid.num_transformers": 0},
    "transformers alone in the middle": {"mid.num_res_blocks": 0, "mid.num_transformers": 2},
    "widening without residual blocks": {"down[1].num_res_blocks": 0, "down[1].num_transformers": 3},
    "skips to spare": {"up[0].num_res_blocks": 1, "up[1].num_res_blocks": 1},
    "blocks to spare": {"up[0].num_res_blocks": 4, "up[1].num_res_blocks": 5},
    "six on two": {"up[1].num_transformers": 6, "up[1].num_res_blocks": 2, "down[1].num_transformers": 0},
}


@pytest.fixture(params=VARIETY.values(), ids=VARIETY)
def arch(request: pytest.FixtureRequest) -> Architecture:
    return tiny(request.param)


def test_velocity_has_the_samples_shape_and_every_weight_a_gradient(arch: Architecture) -> None:
    net = stirred(arch)
    sample, timestep, context = inputs(arch, size=6)
    out = net(sample, timestep, context)
    assert out.shape == sample.shape
    out.square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle
    assert not [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.abs().max() > 0]


def test_saved_and_loaded_it_gives_identical_outputs(arch: Architecture, tmp_path: Path) -> None:
    net = stirred(arch)
    net.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.arch == arch
    with torch.no_grad():
        assert torch.equal(loaded(*inputs(arch)), net(*inputs(arch)))
    assert loaded.conv_in.weight.stride() == net.conv_in.weight.stride()


def test_the_architecture_as_json_builds_the_same_net(arch: Architecture) -> None:
    net, from_json = UNet(arch), UNet(json.loads(arch.to_json()))
    assert net.arch == from_json.arch
    assert net.config == from_json.config


def test_images_of_a_batch_do_not_see_each_other(arch: Architecture) -> None:
    net = stirred(arch)
    sample, timestep, context = inputs(arch, batch=3)
    with torch.no_grad():
        together = net(sample, timestep, context)
        alone = net(sample[1:2], timestep[1:2], context[1:2])
    torch.testing.assert_close(together[1:2], alone)


def test_bf16(arch: Architecture) -> None:
    net = stirred(arch).to(torch.bfloat16)
    sample, timestep, context = inputs(arch)
    out = net(sample.bfloat16(), timestep, context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_a_new_net_predicts_zero_and_learns_at_once() -> None:
    net = UNet(tiny(SNAPGEN))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batch = inputs(net.arch)
    target = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        out = net(*batch)
        if not losses:
            assert out.abs().max() == 0
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_weights_come_from_the_seed_and_the_name_alone() -> None:
    torch.manual_seed(0)
    net = UNet(tiny())
    state = torch.get_rng_state()
    other = UNet(tiny({"down[0].num_res_blocks": 2}))
    assert not torch.equal(net.conv_in.weight, torch.zeros_like(net.conv_in.weight))
    assert torch.equal(net.conv_in.weight, other.conv_in.weight)
    other.init_weights(1)
    assert not torch.equal(net.conv_in.weight, other.conv_in.weight)
    assert torch.equal(UNet(tiny()).conv_in.weight, net.conv_in.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("timestep", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([0.3, 0.3])])
def test_one_timestep_serves_all(timestep: float | Tensor) -> None:
    net = stirred(tiny())
    sample, _, context = inputs(net.arch)
    with torch.no_grad():
        torch.testing.assert_close(net(sample, timestep, context), net(sample, torch.full((2,), 0.3), context))


def test_unfit_inputs_are_refused() -> None:
    net = UNet(tiny())
    sample, timestep, context = inputs(net.arch)
    for unfit, words in (
        ((sample[:, :2], timestep, context), "2 channels"),
        ((sample[:, :, :3], timestep, context), "multiples of 2"),
        ((sample, timestep, None), "cross-attention"),
        ((sample, timestep, context[..., :5]), "5 wide"),
    ):
        with pytest.raises(ValueError, match=words):
            net(*unfit)


def test_without_cross_attention_no_context_is_needed() -> None:
    net = stirred(tiny({"all.cross_attention": False}))
    sample, timestep, context = inputs(net.arch)
    with torch.no_grad():
        assert torch.equal(net(sample, timestep), net(sample, timestep, context[..., :5]))


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_build_without_memory(name: str) -> None:
    with torch.device("meta"):
        net = UNet(presets.preset(name))
    assert all(p.is_meta for p in net.parameters())


# --- training ---


def test_features_and_head_are_the_net(arch: Architecture) -> None:
    net = stirred(arch)
    with torch.no_grad():
        features = net.forward_features(*inputs(arch))
        assert features.shape == (2, arch.up[0].channels, 4, 4)
        assert torch.equal(net.head(features), net(*inputs(arch)))


def test_gradient_checkpointing_changes_no_gradient_and_stores_less(arch: Architecture) -> None:
    net = stirred(arch).train()
    gradients, stored = [], []
    for switch in (net.disable_gradient_checkpointing, net.enable_gradient_checkpointing):
        switch()
        net.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            loss = net(*inputs(arch)).square().mean()
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
        stored.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert stored[1] < stored[0] / 2


# --- order of blocks and skips ---


@pytest.mark.parametrize(
    ("transformers", "layers", "shares"),
    [(2, 2, [1, 1]), (1, 2, [0, 1]), (6, 2, [3, 3]), (3, 2, [1, 2]), (0, 3, [0, 0, 0]), (4, 3, [1, 1, 2])],
)
def test_transformers_are_spread_evenly(transformers: int, layers: int, shares: list[int]) -> None:
    counts = BlocksConfig(num_res_blocks=layers, num_transformers=transformers).layer_counts()
    assert [count for _, count in counts] == shares


@pytest.mark.parametrize(
    ("residual", "transformers", "order"),
    [(2, 1, "RTR"), (3, 2, "RTRTR"), (3, 1, "RRTR"), (1, 1, "RT"), (0, 2, "TT"), (2, 0, "RR"), (0, 0, "")],
)
def test_the_middle(residual: int, transformers: int, order: str) -> None:
    net = UNet(tiny({"mid.num_res_blocks": residual, "mid.num_transformers": transformers}))
    assert "".join(_letters(layer) for layer in net.mid.layers) == order


def _letters(layer: nn.Module) -> str:
    assert isinstance(layer, Layer)
    return "R" * (layer.residual is not None) + "T" * len(layer.transformers)


@pytest.mark.parametrize("blocks_up", [1, 2, 3, 5])
def test_each_block_on_the_way_up_takes_the_newest_skip_left(blocks_up: int) -> None:
    net = stirred(tiny({"up[0].num_res_blocks": blocks_up, "down[0].num_res_blocks": 2}))
    skips: list[Tensor] = []
    layer_inputs: list[Tensor] = []
    net.conv_in.register_forward_hook(lambda *call: skips.append(call[2]))
    for layer in net.down[0].layers:
        layer.register_forward_hook(lambda *call: skips.append(call[2]))
    for layer in net.up[0].layers:
        layer.residual.register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0]))
    net(*inputs(net.arch))
    assert len(skips) == 3
    for i, x in enumerate(layer_inputs):
        if i < 3:
            assert torch.equal(x[:, -8:], skips[-1 - i])
        else:
            assert x.shape[1] == 8


def test_snapfusions_result_is_an_architecture() -> None:
    """arXiv 2306.00980: cross-attention 0/2/2, 6/3/0; residual down 2/2/1, up 2/3/3, and 4 at the lowest resolution."""
    sd = Architecture.model_validate(SD15)
    arch = apply_overrides(
        sd,
        {
            "down[0].num_transformers": 0,
            "down[2].num_res_blocks": 1,
            "up[2].num_transformers": 6,
            "up[2].num_res_blocks": 2,
            "up[0].num_transformers": 0,
            "down[3].num_res_blocks": 1,
            "up[3].num_res_blocks": 1,
        },
    )
    with torch.device("meta"):
        net = UNet(arch)
    assert ["".join(_letters(layer) for layer in level.layers) for level in net.down] == ["RR", "RTRT", "RTT", "R"]
    assert ["".join(_letters(layer) for layer in level.layers) for level in net.up] == [
        "RRR",
        "RTRTRT",
        "RTTTRTTT",
        "R",
    ]


def test_sd15_has_its_params() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(SD15).parameters()) == 859_520_964


# --- attention ---


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("rotated", [False, True])
def test_shared_heads_are_multi_head_attention_with_repeated_weights(num_kv_heads: int, rotated: bool) -> None:
    shared = Attention(16, 12, head_dim=4, num_kv_heads=num_kv_heads, qk_norm=True)
    full = Attention(16, 12, head_dim=4, num_kv_heads=None, qk_norm=True)
    with torch.no_grad():
        weight = shared.to_kv.weight.view(2, num_kv_heads, 4, 12).repeat_interleave(4 // num_kv_heads, 1)
        full.to_kv.weight.copy_(weight.reshape(32, 12))
    for name in ("to_q", "to_out", "norm_q", "norm_k"):
        getattr(full, name).load_state_dict(getattr(shared, name).state_dict())
    x, source = torch.randn(2, 6, 16), torch.randn(2, 6, 12)
    rope = layers.rope_table(2, 3, 4, device=x.device, dtype=x.dtype) if rotated else None
    torch.testing.assert_close(shared(x, source, rope), full(x, source, rope))


def test_rope_makes_scores_depend_on_relative_positions_only() -> None:
    height, width, head = 5, 6, 16
    query, key = torch.randn(head), torch.randn(head)
    table = layers.rope_table(height, width, head, device=query.device, dtype=query.dtype)
    everywhere = [
        layers.apply_rope(v.expand(1, height * width, 1, head), table).view(height, width, head) for v in (query, key)
    ]
    scores = torch.einsum("abd,ced->abce", *everywhere)
    for row, column in ((1, 0), (0, 1), (2, 3)):
        there = [scores[r, c, r + row, c + column].item() for r in range(height - row) for c in range(width - column)]
        assert max(there) - min(there) < 1e-4
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 1e-3
    torch.testing.assert_close(everywhere[0].norm(dim=-1), query.norm().expand(height, width))
    torch.testing.assert_close(everywhere[0][0, 0], query)


def test_rope_rotates_the_first_half_by_rows_and_the_second_by_columns() -> None:
    x = torch.ones(1, 12, 1, 8)
    rotated = layers.apply_rope(x, layers.rope_table(3, 4, 8, device=x.device, dtype=x.dtype)).view(3, 4, 8)
    assert torch.equal(rotated[1, 0, :4], rotated[1, 3, :4])
    assert torch.equal(rotated[0, 2, 4:], rotated[2, 2, 4:])
    first, second = torch.tensor(1.0), torch.tensor(1 / layers.ROPE_THETA**0.5)
    torch.testing.assert_close(rotated[1, 0, 0], first.cos() - first.sin())
    torch.testing.assert_close(rotated[1, 0, 3], second.cos() + second.sin())


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys() -> None:
    attention = Attention(16, 16, head_dim=4, num_kv_heads=1, qk_norm=True)
    x = torch.randn(1, 5, 16)
    before = attention(x, x)
    with torch.no_grad():
        attention.to_q.weight.mul_(100)
        attention.to_kv.weight[:4].mul_(50)
    torch.testing.assert_close(attention(x, x), before, rtol=1e-3, atol=1e-4)


# --- export ---


def test_it_exports_as_one_graph_with_the_same_output() -> None:
    net = stirred(tiny(SNAPGEN))
    batch = inputs(net.arch, batch=1)
    graph = torch.export.export(net, batch).run_decompositions({})
    with torch.no_grad():
        torch.testing.assert_close(graph.module()(*batch), net(*batch))


def test_tokens_are_a_view_of_channels_last_images() -> None:
    net = stirred(tiny(SNAPGEN))
    seen: list[Tensor] = []
    for transformer in (m for m in net.modules() if isinstance(m, layers.SpatialTransformer)):
        transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        transformer.proj_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*inputs(net.arch))
    assert seen
    for x in seen:
        assert x.is_contiguous() if x.dim() == 3 else x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "timestep", [500, 999.0, -3, torch.tensor(1.01), torch.tensor([0.5, 20.0]), torch.tensor([500])]
)
def test_diffusers_timesteps_are_refused(timestep: Any) -> None:
    arch = tiny()
    net = stirred(arch)
    sample, _, context = inputs(arch)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"net takes timesteps from 0 \(data\) to 1 \(noise\): divide diffusers'"):
            net(sample, timestep, context)
    for fine in (0, 1, 0.5, -0.001, torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0], dtype=torch.bfloat16)):
        assert net(sample, fine, context).isfinite().all()


def test_a_converted_net_refuses_its_schedulers_timesteps() -> None:
    from snapgen.conversion.from_diffusers import from_diffusers
    from tests.snapgen.diffusers_nets import SMALL, reference

    net = from_diffusers(reference(SMALL)).net
    sample, _, context = inputs(net.arch, size=8)
    scheduler = make_process("noise").scheduler()
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        with pytest.raises(ValueError, match="divide diffusers' by the scheduler's"):
            net(sample, timestep, context)
        net(sample, timestep / scheduler.config.num_train_timesteps, context)


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    level = {"channels": 4096, "num_res_blocks": 2}
    arch = Architecture.model_validate({"down": [level], "up": [level]})
    monkeypatch.setattr(devices, "free_memory", lambda: 10_000_000_000)
    check_memory(arch, copies=1)
    with pytest.raises(InputError, match=r"architecture \w+: needs 35\.\d GB of memory or more, and 10\.0 GB are free"):
        check_memory(arch, copies=4, source=None)


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1_000_000 < devices.free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(devices, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert devices.free_memory() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.free_memory() > 5_000_000
