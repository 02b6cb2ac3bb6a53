"""The tiny decoder has the published size and parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snapgen.autoencoders.tiny_decoder import PAPER, SeparableResBlock, TinyDecoder, Upsample

NARROW: dict[str, Any] = {
    "latent_channels": 12,
    "widths": (16, 32, 64),
    "blocks": (1, 2, 1),
    "mid_blocks": 1,
    "norm_groups": 8,
}
# Other divisions of the published 1.38 M: deeper at low resolution, or with blocks twice as wide inside.
ALTERNATIVES: list[dict[str, Any]] = [
    PAPER,
    PAPER | {"widths": (64, 128, 256, 320), "blocks": (1, 2, 2, 2)},
    PAPER | {"widths": (64, 96, 128, 256), "blocks": (1, 1, 2, 2), "expansion": 2},
]


def build(config: dict[str, Any]) -> TinyDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyDecoder(**config)


@pytest.mark.parametrize("config", ALTERNATIVES)
def test_paper_size(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        decoder = TinyDecoder(**config)
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert abs(count / 1.38e6 - 1) < 0.01


@pytest.mark.parametrize("config", [PAPER, NARROW])
def test_parts_are_the_papers(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        decoder = TinyDecoder(**config)
    kinds = Counter(type(module) for module in decoder.modules())
    blocks = sum(config["blocks"]) + config["mid_blocks"]
    assert kinds[SeparableResBlock] == blocks
    assert kinds[nn.GroupNorm] == blocks + 1
    assert kinds[Upsample] == len(config["widths"]) - 1
    allowed = {nn.Conv2d, nn.GroupNorm}
    assert {type(module) for module in decoder.modules() if list(module.parameters(recurse=False))} == allowed
    assert not any("attn" in name or "attention" in name for name, _ in decoder.named_modules())
    # No shortcut: inside a block only pointwise convolutions mix channels, and the way around it is the identity.
    assert not any("shortcut" in name for name, _ in decoder.named_modules())
    wide = [conv for conv in decoder.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
    assert sum(conv.groups == 1 for conv in wide) == 2, "only conv_in and conv_out are plain 3×3"


def test_a_block_begins_at_its_input() -> None:
    block = SeparableResBlock(16, expansion=2, norm_groups=8)
    nn.init.zeros_(block.narrow.weight)
    assert block.narrow.bias is not None
    nn.init.zeros_(block.narrow.bias)
    x = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 5), (1, 1)])
def test_any_size_is_decoded(height: int, width: int) -> None:
    decoder = build(NARROW)
    assert decoder.factor == 4
    image = decoder(torch.zeros(2, 12, height, width))
    assert image.shape == (2, 3, 4 * height, 4 * width)


def test_every_weight_learns() -> None:
    decoder = build(NARROW)
    decoder(torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    silent = [name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not silent


def test_saved_and_loaded_is_identical(tmp_path: Path) -> None:
    decoder = build(NARROW)
    decoder.save_pretrained(tmp_path)
    again = TinyDecoder.from_pretrained(tmp_path)
    latents = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(latents), decoder(latents))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": (1, 2)}, "one of each per level"),
        ({"widths": (), "blocks": ()}, "one of each per level"),
        ({"widths": (20, 32, 64)}, "multiples of 8"),
        ({"expansion": 1.3}, "multiples of 8"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TinyDecoder(**NARROW | change)
