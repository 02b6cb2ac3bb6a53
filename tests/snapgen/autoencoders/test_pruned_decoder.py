"""What is left of a decoder whose channels are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import KLAutoencoder
from snapgen.autoencoders.pruned_decoder import PrunedAutoencoderKL, decode_image, layers, prune_decoder, pruned_width
from snapgen.coreml.kl_decoder import KLDecoder
from snapgen.errors import InputError
from tests.snapgen.diffusers_nets import SD_KL, small_kl

LATENTS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def params(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@torch.no_grad()
def stirred_kl(**changes: Any) -> AutoencoderKL:
    """With norms and biases that are not all alike."""
    vae = small_kl(**changes)
    random = torch.Generator().manual_seed(2)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return vae


def test_stable_diffusions_decoder_by_ratio() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD_KL)
        sizes = {ratio: params(prune_decoder(vae, ratio).decoder) for ratio in (0.0, 0.25, 0.5, 0.75)}
    assert sizes == {0.0: 49_490_179, 0.25: 27_849_411, 0.5: 12_387_459, 0.75: 3_104_323}
    assert sizes[0.0] / sizes[0.5] == pytest.approx(4.0, abs=0.005)  # published: 50 M to 13 M, 3.8 times fewer


def test_half_of_it_is_the_decoder_of_half_the_width() -> None:
    with torch.device("meta"):
        thin = AutoencoderKL(**{**SD_KL, "block_out_channels": (64, 128, 256, 256)})
        found = prune_decoder(AutoencoderKL(**SD_KL), 0.5)
    shapes = {name: tensor.shape for name, tensor in found.decoder.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in thin.decoder.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False}, {"use_post_quant_conv": False}])
@torch.no_grad()
def test_ratio_0_is_the_same_decoder(changes: dict[str, Any]) -> None:
    vae = stirred_kl(**changes)
    same = prune_decoder(vae, 0)
    assert torch.equal(decode_image(same, LATENTS), decode_image(vae, LATENTS))
    assert torch.equal(decode_image(same, LATENTS), KLAutoencoder(vae)._decode(LATENTS))
    assert not {p.data_ptr() for p in same.parameters()} & {p.data_ptr() for p in vae.parameters()}


@pytest.mark.parametrize("layers_per_block", [1, 2])
@torch.no_grad()
def test_cutting_channels_that_add_nothing_changes_nothing(layers_per_block: int) -> None:
    """Odd channels repeat the even ones, a little weaker, and nobody reads them: half of every group can go."""
    vae = stirred_kl(layers_per_block=layers_per_block)
    for path, (written, read) in layers(vae.decoder).items():
        layer: Any = vae.decoder.get_submodule(path)
        if isinstance(layer, nn.GroupNorm):
            layer.weight[1::2], layer.bias[1::2] = layer.weight[::2], layer.bias[::2]
            continue
        if read is not None:
            layer.weight[:, 1::2] = 0
        if written is not None:
            layer.weight.div_(layer.weight.flatten(1).norm(dim=1).view(-1, *[1] * (layer.weight.ndim - 1)))
            repeated = 0.0 if path.endswith("to_k") else 0.99999  # a key's product with its query is counted once
            layer.weight[1::2], layer.bias[1::2] = layer.weight[::2] * repeated, layer.bias[::2] * repeated
    found = prune_decoder(vae, 0.5)
    assert torch.equal(found.decoder.conv_in.bias, vae.decoder.conv_in.bias[::2])
    expected = decode_image(vae, LATENTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(decode_image(found, LATENTS), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_largest_of_each_group_stay_by_all_that_write_them() -> None:
    vae = small_kl()
    trunk = [path for path, ends in layers(vae.decoder).items() if ends.written == "conv_in"]
    writers = [path for path in trunk if isinstance(vae.decoder.get_submodule(path), nn.Conv2d | nn.Linear)]
    # What the middle and the first level add up: conv_in, two blocks and the attention, three blocks.
    assert len(writers) == 1 + 2 + 1 + 2
    for path in writers:
        vae.decoder.get_submodule(path).weight.zero_()  # type: ignore[operator, union-attr]
    # Groups of four. A channel's norm counts over all writers: 1.5 in one are less than 1.2 in two.
    for channel, weights in {0: (1.5,), 1: (1.2, 1.2), 3: (2.0,), 6: (0.1,), 4: (0.2,), 11: (1.0,), 8: (1.0,)}.items():
        for path, weight in zip(writers, weights, strict=False):
            vae.decoder.get_submodule(path).weight[channel].flatten()[0] = weight  # type: ignore[operator, union-attr]
    found = prune_decoder(vae, 0.5)
    stay = found.decoder.conv_in.bias
    assert torch.equal(stay[:6], vae.decoder.conv_in.bias[[1, 3, 4, 6, 8, 11]])


@pytest.mark.parametrize(
    ("width", "groups", "ratio", "kept"),
    [(128, 32, 0.5, 64), (128, 32, 0.3, 96), (512, 32, 0.3, 352), (512, 32, 0.9, 64), (8, 4, 0.75, 4), (8, 4, 0.2, 8)],
)
def test_as_many_of_each_group_stay(width: int, groups: int, ratio: float, kept: int) -> None:
    assert pruned_width(width, groups, ratio) == kept


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "ratio: 1.0 is not a share of channels to prune; use 0 or more and less than 1"),
        (-0.1, "ratio: -0.1 is not a share"),
        (float("nan"), "ratio: nan is not a share"),
        (0.9, "ratio: 0.9 leaves none of 8 channels in 4 groups; use at most 0.75"),
    ],
)
def test_a_ratio_that_cannot_be_is_told(ratio: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prune_decoder(small_kl(), ratio)


def test_another_kind_of_decoder_is_told() -> None:
    vae = small_kl(up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"))
    with pytest.raises(InputError, match="vae: up_block_types: has a decoder with AttnUpDecoderBlock2D"):
        prune_decoder(vae, 0.5, source="vae")


@torch.no_grad()
def test_what_is_saved_is_read_as_an_autoencoder(tmp_path: Path) -> None:
    vae = stirred_kl()
    small = prune_decoder(vae, 0.5)
    small.save_pretrained(tmp_path)
    for again in (PrunedAutoencoderKL.from_pretrained(tmp_path), autoencoder.load_autoencoder(tmp_path).net):  # type: ignore[union-attr]
        assert isinstance(again, AutoencoderKL)
        assert again.config.decoder_channels == (4, 8)
        torch.testing.assert_close(decode_image(again, LATENTS), decode_image(small, LATENTS))
    pixels = torch.rand(1, 3, 12, 12) * 2 - 1
    whole, loaded = KLAutoencoder(vae), autoencoder.load_autoencoder(tmp_path)
    torch.testing.assert_close(whole.encode(pixels), loaded.encode(pixels))
    assert autoencoder.digest(tmp_path)


@torch.no_grad()
def test_a_shortcut_stays_between_widths_that_became_equal(tmp_path: Path) -> None:
    twice = prune_decoder(prune_decoder(stirred_kl(), 0.5), 0.5)
    assert twice.config.decoder_channels == (4, 4)
    assert twice.decoder.up_blocks[1].resnets[0].conv_shortcut is not None
    twice.save_pretrained(tmp_path)
    again = PrunedAutoencoderKL.from_pretrained(tmp_path)
    torch.testing.assert_close(decode_image(again, LATENTS), decode_image(twice, LATENTS))


@torch.no_grad()
def test_core_mls_decoder_takes_it() -> None:
    small = prune_decoder(stirred_kl(), 0.5)
    expected = decode_image(small, LATENTS[:1])
    torch.testing.assert_close(KLDecoder(small)(LATENTS[:1]), expected, rtol=1e-4, atol=1e-5)
