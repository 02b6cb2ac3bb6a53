"""The Core ML form of every layer computes what the layer does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.coreml import layers
from snapgen.coreml.layers import CoreMLUNet, substitute, time_features
from snapgen.models import layers as blocks
from tests.snapgen.autoencoders.test_tiny_decoder import NARROW
from tests.snapgen.nets import inputs, stirred, tiny

VARIETY: dict[str, dict[str, Any]] = {
    "mhsa": {},
    "mqa": {"all.num_kv_heads": 1},
    "gqa": {"all.num_kv_heads": 2, "down[0].num_transformers": 1, "up[0].num_transformers": 1},
    "qk norm": {"qk_norm": True},
    "rope": {"rope": True, "all.num_kv_heads": 2},
    "snapgen": {"qk_norm": True, "rope": True, "all.num_kv_heads": 1, "all.conv": "separable", "all.expansion": 2},
    "time at the output": {"time.projection": "output", "all.conv": "separable"},
    "no context": {"all.cross_attention": False, "qk_norm": True, "rope": True},
    "context alone": {"all.self_attention": False, "qk_norm": True, "rope": True, "all.num_kv_heads": 2},
    "no attention": {"all.self_attention": False, "all.cross_attention": False},
    "no residual blocks": {"down[0].num_res_blocks": 0, "down[0].num_transformers": 2},
}


@pytest.mark.parametrize("longest", [1, 16_384], ids=["keys repeated", "queries merged"])
@pytest.mark.parametrize("changes", VARIETY.values(), ids=VARIETY)
@torch.no_grad()
def test_a_net_in_its_core_ml_form_computes_the_same(
    changes: dict[str, Any], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_SIDE", longest)
    net = stirred(tiny(changes))
    sample, timestep, context = inputs(net.arch, batch=1)
    expected = net(sample, timestep, context)
    found = CoreMLUNet(copy.deepcopy(net), 4)(sample, time_features(timestep, net.arch.time.embed_dim), context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.std().item())


@torch.no_grad()
def test_a_tiny_decoder_in_its_core_ml_form_computes_the_same() -> None:
    decoder = TinyDecoder(**NARROW).eval()
    own = copy.deepcopy(decoder)
    substitute(own)
    latents = torch.randn(1, NARROW["latent_channels"], 4, 4)
    torch.testing.assert_close(own(latents), decoder(latents), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_captions_keys_are_no_zero_over_zero_in_half_precision() -> None:
    """The smallest epsilon of any norm of heads is a normal number of half precision."""
    attention = blocks.Attention(16, 12, head_dim=4, num_kv_heads=1, qk_norm=True)
    norm = layers.HeadNorm.of(attention, axis=1)
    assert norm is not None
    assert norm.eps >= torch.finfo(torch.float16).tiny
    assert torch.equal(norm(torch.zeros(5, 4, 1, 3)), torch.zeros(5, 4, 1, 3))


def test_time_features_are_those_of_the_net() -> None:
    module = blocks.TimestepEmbedding(8, 16)
    seen: list[torch.Tensor] = []
    module.linear_1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for timestep in (0.0, 0.123, 1.0):
        module(torch.tensor([timestep]))
        torch.testing.assert_close(time_features(timestep, 8), seen.pop(), rtol=0, atol=1e-6)
