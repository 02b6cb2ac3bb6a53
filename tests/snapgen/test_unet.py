"""The U-Net: it is diffusers' where it should be, and the papers' where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from snapgen import blocks, presets
from snapgen.arch import Architecture
from snapgen.blocks import Attention
from snapgen.paths import changed
from snapgen.unet import Layer, UNet, dealt
from tests.snapgen.nets import SD15, inputs, stirred, tiny

SNAPGEN: dict[str, Any] = {  # the paper's choices, small
    "qk_norm": True,
    "rope": True,
    "time.projection": "output",
    "all.conv": "separable",
    "all.expansion": 2,
    "all.ffn_ratio": 3,
    "all.kv_heads": 1,
    "down[0].residual_blocks": 0,
    "down[0].transformers": 2,
    "stages[0].self_attention": False,
}

VARIETY: dict[str, dict[str, Any]] = {
    "tiny": {},
    "snapgen": SNAPGEN,
    "gqa": {"all.kv_heads": 2, "rope": True},
    "no attention": {"all.self_attention": False, "all.cross_attention": False},
    "no middle": {"mid.residual_blocks": 0, "mid.transformers": 0},
    "transformers alone in the middle": {"mid.residual_blocks": 0, "mid.transformers": 2},
    "widening without residual blocks": {"down[1].residual_blocks": 0, "down[1].transformers": 3},
    "skips to spare": {"up[0].residual_blocks": 1, "up[1].residual_blocks": 1},
    "blocks to spare": {"up[0].residual_blocks": 4, "up[1].residual_blocks": 5},
    "six on two": {"up[1].transformers": 6, "up[1].residual_blocks": 2, "down[1].transformers": 0},
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
    one, other = UNet(arch), UNet(json.loads(arch.to_json()))
    assert one.arch == other.arch
    assert one.config == other.config


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
    one = UNet(tiny())
    state = torch.get_rng_state()
    other = UNet(tiny({"down[0].residual_blocks": 2}))
    assert not torch.equal(one.conv_in.weight, torch.zeros_like(one.conv_in.weight))
    assert torch.equal(one.conv_in.weight, other.conv_in.weight)
    other.initialise(1)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)
    assert torch.equal(UNet(tiny()).conv_in.weight, one.conv_in.weight)
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


# --- where things stand ---


@pytest.mark.parametrize(
    ("transformers", "layers", "shares"),
    [(2, 2, [1, 1]), (1, 2, [0, 1]), (6, 2, [3, 3]), (3, 2, [1, 2]), (0, 3, [0, 0, 0]), (4, 3, [1, 1, 2])],
)
def test_transformers_are_dealt_evenly_later_blocks_first(transformers: int, layers: int, shares: list[int]) -> None:
    assert dealt(transformers, layers) == shares


@pytest.mark.parametrize(
    ("residual", "transformers", "order"),
    [(2, 1, "RTR"), (3, 2, "RTRTR"), (3, 1, "RRTR"), (1, 1, "RT"), (0, 2, "TT"), (2, 0, "RR"), (0, 0, "")],
)
def test_the_middle(residual: int, transformers: int, order: str) -> None:
    net = UNet(tiny({"mid.residual_blocks": residual, "mid.transformers": transformers}))
    assert "".join(_letters(layer) for layer in net.mid.layers) == order


def _letters(layer: nn.Module) -> str:
    assert isinstance(layer, Layer)
    return "R" * (layer.residual is not None) + "T" * len(layer.transformers)


@pytest.mark.parametrize("blocks_up", [1, 2, 3, 5])
def test_each_block_on_the_way_up_takes_the_newest_skip_left(blocks_up: int) -> None:
    net = stirred(tiny({"up[0].residual_blocks": blocks_up, "down[0].residual_blocks": 2}))
    skips: list[Tensor] = []
    taken: list[Tensor] = []
    net.conv_in.register_forward_hook(lambda *call: skips.append(call[2]))
    for layer in net.down[0].layers:
        layer.register_forward_hook(lambda *call: skips.append(call[2]))
    for layer in net.up[0].layers:
        layer.residual.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    net(*inputs(net.arch))
    assert len(skips) == 3
    for i, x in enumerate(taken):
        if i < 3:
            assert torch.equal(x[:, -8:], skips[-1 - i])
        else:
            assert x.shape[1] == 8


def test_snapfusions_result_is_an_architecture() -> None:
    """arXiv 2306.00980: cross-attention 0/2/2, 6/3/0; residual down 2/2/1, up 2/3/3, and 4 at the lowest resolution."""
    sd = Architecture.model_validate(SD15)
    arch = changed(
        sd,
        {
            "down[0].transformers": 0,
            "down[2].residual_blocks": 1,
            "up[2].transformers": 6,
            "up[2].residual_blocks": 2,
            "up[0].transformers": 0,
            "down[3].residual_blocks": 1,
            "up[3].residual_blocks": 1,
        },
    )
    with torch.device("meta"):
        net = UNet(arch)
    assert ["".join(_letters(layer) for layer in stage.layers) for stage in net.down] == ["RR", "RTRT", "RTT", "R"]
    assert ["".join(_letters(layer) for layer in stage.layers) for stage in net.up] == [
        "RRR",
        "RTRTRT",
        "RTTTRTTT",
        "R",
    ]


# --- agreement with diffusers ---


def test_sd15_has_its_params() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(SD15).parameters()) == 859_520_964


def _reference(depth: int, linear: bool) -> tuple[UNet2DConditionModel, Architecture]:
    """Three levels, the first without attention, as diffusers builds them and as we describe them."""
    reference = UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, depth),
        attention_head_dim=(1, 2, 3),  # diffusers means heads
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=linear,
    )
    attending = {"head_width": 8, "transformer_depth": 1}
    arch = Architecture.model_validate(
        {
            "latent_channels": 3,
            "context_width": 12,
            "norm_groups": 4,
            "time": {"frequencies": 8, "width": 32},
            "down": [
                {"channels": 8},
                {"channels": 16, "transformers": 2, **attending},
                {"channels": 24, "transformers": 2, **attending, "transformer_depth": depth},
            ],
            "mid": {"transformers": 1, "head_width": 8, "transformer_depth": depth},
            "up": [
                {"channels": 8, "residual_blocks": 3},
                {"channels": 16, "residual_blocks": 3, "transformers": 3, **attending},
                {"channels": 24, "residual_blocks": 3, "transformers": 3, **attending, "transformer_depth": depth},
            ],
        }
    )
    return reference, arch


@pytest.mark.parametrize(("depth", "linear"), [(1, False), (2, True)], ids=["sd", "sdxl"])
def test_with_diffusers_weights_it_computes_what_diffusers_does(depth: int, linear: bool) -> None:
    reference, arch = _reference(depth, linear)
    net = UNet(arch).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        _copy_unet(reference, net)
        sample, timestep, context = inputs(arch, size=8)
        expected = reference(sample, 1000 * timestep, context).sample
        torch.testing.assert_close(
            net(sample, timestep, context), expected, rtol=1e-4, atol=1e-4 * expected.std().item()
        )


def _copy(source: nn.Module | list[nn.Module], target: nn.Module) -> None:
    sources = source if isinstance(source, list) else [source]
    for name, parameter in target.named_parameters():
        parameter.copy_(torch.cat([s.get_parameter(name) for s in sources]).view(parameter.shape))


def _copy_unet(reference: Any, net: Any) -> None:
    _copy(reference.time_embedding.linear_1, net.time.linear1)
    _copy(reference.time_embedding.linear_2, net.time.linear2)
    _copy(reference.conv_in, net.conv_in)
    for theirs, ours in zip(reference.down_blocks, net.down, strict=True):
        _copy_stage(theirs, ours)
        if ours.sampler is not None:
            _copy(theirs.downsamplers[0].conv, ours.sampler)
    _copy_residual(reference.mid_block.resnets[0], net.mid.layers[0].residual)
    _copy_transformer(reference.mid_block.attentions[0], net.mid.layers[0].transformers[0])
    _copy_residual(reference.mid_block.resnets[1], net.mid.layers[1].residual)
    for theirs, ours in zip(reference.up_blocks, reversed(net.up), strict=True):
        _copy_stage(theirs, ours)
        if ours.sampler is not None:
            _copy(theirs.upsamplers[0].conv, ours.sampler.conv)
    _copy(reference.conv_norm_out, net.norm_out)
    _copy(reference.conv_out, net.conv_out)


def _copy_stage(theirs: Any, ours: Any) -> None:
    attentions = getattr(theirs, "attentions", [])
    for i, layer in enumerate(ours.layers):
        _copy_residual(theirs.resnets[i], layer.residual)
        assert len(layer.transformers) == (1 if len(attentions) else 0)
        for transformer in layer.transformers:
            _copy_transformer(attentions[i], transformer)


def _copy_residual(theirs: Any, ours: Any) -> None:
    for their, our in (("norm1", "norm1"), ("conv1", "conv1"), ("time_emb_proj", "time"), ("norm2", "norm2")):
        _copy(getattr(theirs, their), getattr(ours, our))
    _copy(theirs.conv2, ours.conv2)
    if theirs.conv_shortcut is not None:
        _copy(theirs.conv_shortcut, ours.shortcut)


def _copy_transformer(theirs: Any, ours: Any) -> None:
    for name in ("norm", "proj_in", "proj_out"):
        _copy(getattr(theirs, name), getattr(ours, name))
    for their, our in zip(theirs.transformer_blocks, ours.blocks, strict=True):
        for name in ("norm1", "norm2", "norm3"):
            _copy(getattr(their, name), getattr(our, name))
        for attention, ours_attention in ((their.attn1, our.attend_self), (their.attn2, our.attend_context)):
            _copy(attention.to_q, ours_attention.queries)
            _copy([attention.to_k, attention.to_v], ours_attention.keys_values)
            _copy(attention.to_out[0], ours_attention.out)
        _copy(their.ff.net[0].proj, our.feed_forward.expand)
        _copy(their.ff.net[2], our.feed_forward.contract)


# --- attention ---


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_shared_heads_are_multi_head_attention_with_repeated_weights(kv_heads: int, turned: bool) -> None:
    shared = Attention(16, 12, head_width=4, kv_heads=kv_heads, norm=True)
    full = Attention(16, 12, head_width=4, kv_heads=None, norm=True)
    with torch.no_grad():
        weight = shared.keys_values.weight.view(2, kv_heads, 4, 12).repeat_interleave(4 // kv_heads, 1)
        full.keys_values.weight.copy_(weight.reshape(32, 12))
    for name in ("queries", "out", "query_norm", "key_norm"):
        getattr(full, name).load_state_dict(getattr(shared, name).state_dict())
    x, source = torch.randn(2, 6, 16), torch.randn(2, 6, 12)
    turn = blocks.rotation(2, 3, 4, like=x) if turned else None
    torch.testing.assert_close(shared(x, source, turn), full(x, source, turn))


def test_rope_makes_scores_depend_on_relative_places_alone() -> None:
    height, width, head = 5, 6, 16
    query, key = torch.randn(head), torch.randn(head)
    table = blocks.rotation(height, width, head, like=query)
    everywhere = [
        blocks.rotated(v.expand(1, height * width, 1, head), table).view(height, width, head) for v in (query, key)
    ]
    scores = torch.einsum("abd,ced->abce", *everywhere)
    for row, column in ((1, 0), (0, 1), (2, 3)):
        there = [scores[r, c, r + row, c + column].item() for r in range(height - row) for c in range(width - column)]
        assert max(there) - min(there) < 1e-4
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 1e-3
    torch.testing.assert_close(everywhere[0].norm(dim=-1), query.norm().expand(height, width))
    torch.testing.assert_close(everywhere[0][0, 0], query)


def test_rope_turns_the_first_half_by_rows_and_the_second_by_columns() -> None:
    x = torch.ones(1, 12, 1, 8)
    by_place = blocks.rotated(x, blocks.rotation(3, 4, 8, like=x)).view(3, 4, 8)
    assert torch.equal(by_place[1, 0, :4], by_place[1, 3, :4])
    assert torch.equal(by_place[0, 2, 4:], by_place[2, 2, 4:])
    first, second = torch.tensor(1.0), torch.tensor(1 / blocks.ROPE_THETA**0.5)
    torch.testing.assert_close(by_place[1, 0, 0], first.cos() - first.sin())
    torch.testing.assert_close(by_place[1, 0, 3], second.cos() + second.sin())


def test_qk_norm_makes_attention_blind_to_the_size_of_queries_and_keys() -> None:
    attention = Attention(16, 16, head_width=4, kv_heads=1, norm=True)
    x = torch.randn(1, 5, 16)
    before = attention(x, x)
    with torch.no_grad():
        attention.queries.weight.mul_(100)
        attention.keys_values.weight[:4].mul_(50)
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
    for transformer in (m for m in net.modules() if isinstance(m, blocks.Transformer)):
        transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        transformer.proj_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*inputs(net.arch))
    assert seen
    for x in seen:
        assert x.is_contiguous() if x.dim() == 3 else x.is_contiguous(memory_format=torch.channels_last)
