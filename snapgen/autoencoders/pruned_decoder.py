"""An AutoencoderKL with uniformly pruned decoder channels; the remaining channels keep their weights.

SnapFusion's decoder (arXiv 2306.00980, section 3.2) keeps half of Stable Diffusion's channels. The paper does not say
which ones; here they are those with the largest weights in the layers that write them.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401 - diffusers looks for it in the module of a class
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from snapgen.autoencoders.latent_scale import latent_scale
from snapgen.errors import InputError

SNAPFUSION_RATIO = 0.5
"""Share of the decoder's channels that SnapFusion prunes."""


class PrunedAutoencoderKL(AutoencoderKL):  # type: ignore[misc]
    """diffusers' AutoencoderKL with separate decoder widths, which in diffusers are the encoder's.

    diffusers accepts it in place of an AutoencoderKL. Its saved folder must be loaded by this class.

    Args:
        decoder_channels: like ``block_out_channels``, for the decoder.
        config: arguments of `AutoencoderKL`.
    """

    def __init__(self, *, decoder_channels: Sequence[int], **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(decoder_channels=tuple(decoder_channels))
        self.decoder = _decoder(self.config, decoder_channels)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Config keys, which diffusers takes from the signature of ``__init__``; ours names only the new one."""
        keys: set[str] = AutoencoderKL._get_init_keys(input_class)
        return keys | AutoencoderKL._get_init_keys(AutoencoderKL) if input_class is PrunedAutoencoderKL else keys


def prune_decoder(vae: AutoencoderKL, ratio: float, *, source: str = "autoencoder") -> PrunedAutoencoderKL:
    """Prune a decoder's channels; the encoder and the latents stay the same.

    For every width w in g norm groups, w/g · (1 − ratio) channels per group remain, rounded to an integer. Channels
    that are summed by residual connections are pruned together. Each group keeps the channels whose weights have the
    largest norm over all convolutions that write them. The attention's queries are rescaled to keep its logits' scale.

    Args:
        vae: the autoencoder; not changed.
        ratio: share of the channels to prune, in [0, 1); 0 gives the same decoder.
        source: name of the autoencoder in error messages.

    Raises:
        InputError: if the ratio is out of range or leaves a group without channels, or the decoder has unsupported
            blocks.
    """
    _check_blocks(vae, source)
    new_widths = {width: pruned_width(width, groups(vae), ratio) for width in _decoder_widths(vae)}
    config = {key: value for key, value in vae.config.items() if key[0] != "_" and key != "decoder_channels"}
    with torch.device("meta"):
        pruned = PrunedAutoencoderKL(**config, decoder_channels=[new_widths[width] for width in _decoder_widths(vae)])
    for module in ("encoder", "quant_conv", "post_quant_conv"):
        setattr(pruned, module, copy.deepcopy(getattr(vae, module)))
    pruned.decoder.load_state_dict(_pruned_weights(vae.decoder, new_widths, groups(vae)), assign=True)
    return cast(PrunedAutoencoderKL, pruned.train(vae.training))


def pruned_width(width: int, groups: int, ratio: float) -> int:
    """Number of channels that remain out of ``width``: the same number in each of the norm's groups.

    Raises:
        InputError: if the ratio is not in [0, 1), or no channel remains.
    """
    if not 0 <= ratio < 1:
        raise InputError(
            "ratio",
            f"{ratio} is not a share of channels to prune",
            "use 0 or more and less than 1; SnapFusion's is 0.5",
        )
    group_size = width // groups
    remaining = math.floor(group_size * (1 - ratio) + 0.5)
    if remaining < 1:
        max_ratio = math.floor(100 * (1 - 0.5 / group_size)) / 100
        problem = f"{ratio} leaves none of {width} channels in {groups} groups"
        raise InputError("ratio", problem, f"use at most {max_ratio}")
    return remaining * groups


def groups(vae: AutoencoderKL) -> int:
    """Number of groups of the decoder's norms."""
    return int(vae.config.norm_num_groups)


def _decoder_widths(vae: AutoencoderKL) -> Sequence[int]:
    widths: Sequence[int] = vae.config.get("decoder_channels") or vae.config.block_out_channels
    return widths


def _check_blocks(vae: AutoencoderKL, source: str) -> None:
    unsupported = [kind for kind in vae.config.up_block_types if kind != "UpDecoderBlock2D"]
    if unsupported:
        raise InputError(
            source,
            f"has a decoder with {unsupported[0]}",
            "use one with UpDecoderBlock2D only, such as Stable Diffusion's",
            place="up_block_types",
        )


def _decoder(config: Mapping[str, Any], channels: Sequence[int]) -> Decoder:
    """A decoder of the given widths with a shortcut convolution wherever the full decoder has one.

    diffusers makes no shortcut convolution between equal widths, which rounding may produce from different ones.
    """
    decoder = Decoder(
        in_channels=config["latent_channels"],
        out_channels=config["out_channels"],
        up_block_types=config["up_block_types"],
        block_out_channels=tuple(channels),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
        act_fn=config["act_fn"],
        mid_block_add_attention=config["mid_block_add_attention"],
    )
    full = list(reversed(config["block_out_channels"]))
    for level, width_before, width in zip(decoder.up_blocks[1:], full, full[1:], strict=False):
        block = level.resnets[0]
        if width_before != width and block.conv_shortcut is None:
            block.conv_shortcut = nn.Conv2d(block.in_channels, block.out_channels, 1)
    return decoder


class _ChannelSets(NamedTuple):
    """Names of the channel sets that a layer writes and reads; None: channels of latents or images, never pruned."""

    written: str | None
    read: str | None


def layers(decoder: Decoder) -> dict[str, _ChannelSets]:
    """Every layer of a decoder by its path, with its channel sets, which are named by the first layer that writes them.

    Channels that are summed belong to the same set. A norm writes the set that it reads.
    """
    return dict(_walk(decoder))


def _walk(decoder: Decoder) -> Iterator[tuple[str, _ChannelSets]]:
    trunk = "conv_in"  # the set that residual connections carry
    yield trunk, _ChannelSets(trunk, None)
    attentions = [*decoder.mid_block.attentions, *[None] * len(decoder.mid_block.resnets)]
    for i, (block, attention) in enumerate(zip(decoder.mid_block.resnets, [None, *attentions], strict=False)):
        if attention is not None:
            yield from _attention(f"mid_block.attentions.{i - 1}", trunk)
        trunk = yield from _residual(f"mid_block.resnets.{i}", block, trunk)
    for level, up_block in enumerate(decoder.up_blocks):
        for i, block in enumerate(up_block.resnets):
            trunk = yield from _residual(f"up_blocks.{level}.resnets.{i}", block, trunk)
        if up_block.upsamplers is not None:
            conv = f"up_blocks.{level}.upsamplers.0.conv"
            yield conv, _ChannelSets(conv, trunk)
            trunk = conv
    yield "conv_norm_out", _ChannelSets(trunk, trunk)
    yield "conv_out", _ChannelSets(None, trunk)


def _residual(path: str, block: ResnetBlock2D, trunk: str) -> Generator[tuple[str, _ChannelSets], None, str]:
    """Yields the block's layers and returns its output's set: the trunk, or a new one with a shortcut convolution."""
    inner, out = f"{path}.conv1", trunk if block.conv_shortcut is None else f"{path}.conv2"
    yield f"{path}.norm1", _ChannelSets(trunk, trunk)
    yield inner, _ChannelSets(inner, trunk)
    yield f"{path}.norm2", _ChannelSets(inner, inner)
    yield f"{path}.conv2", _ChannelSets(out, inner)
    if block.conv_shortcut is not None:
        yield f"{path}.conv_shortcut", _ChannelSets(out, trunk)
    return out


def _attention(path: str, trunk: str) -> Iterator[tuple[str, _ChannelSets]]:
    """Yields an attention's layers. Queries and keys share a set, since their channels are multiplied pairwise."""
    yield f"{path}.group_norm", _ChannelSets(trunk, trunk)
    for layer, written in (("to_q", "to_q"), ("to_k", "to_q"), ("to_v", "to_v")):
        yield f"{path}.{layer}", _ChannelSets(f"{path}.{written}", trunk)
    yield f"{path}.to_out.0", _ChannelSets(trunk, f"{path}.to_v")


@torch.no_grad()
def _pruned_weights(decoder: Decoder, new_widths: Mapping[int, int], groups: int) -> dict[str, Tensor]:
    """State dict of the pruned decoder."""
    channel_sets = layers(decoder)
    remaining = _remaining_channels(decoder, channel_sets, new_widths, groups)
    weights = {}
    for name, tensor in decoder.state_dict().items():
        layer = channel_sets[name.rpartition(".")[0]]
        if layer.written is not None:
            tensor = tensor[remaining[layer.written]]  # (out, in, …) → (pruned out, in, …)
        if tensor.ndim > 1 and layer.read is not None:
            tensor = tensor[:, remaining[layer.read]]  # → (pruned out, pruned in, …)
        weights[name] = tensor.clone()
    for path, module in decoder.named_modules():
        if isinstance(module, Attention):
            # Attention divides its logits by √width, which pruning makes smaller.
            scale = math.sqrt(len(remaining[f"{path}.to_q"]) / module.to_q.out_features)
            for name in (f"{path}.to_q.weight", f"{path}.to_q.bias"):
                weights[name] *= scale
    return weights


def _remaining_channels(
    decoder: Decoder, channel_sets: Mapping[str, _ChannelSets], new_widths: Mapping[int, int], groups: int
) -> dict[str, Tensor]:
    """Sorted indices of the channels that remain in each set."""
    squared_norms: dict[str, list[Tensor]] = defaultdict(list)
    for path, (written, _) in channel_sets.items():
        weight = decoder.get_parameter(f"{path}.weight")
        if written is not None and weight.ndim > 1:
            squared_norms[written].append(weight.double().square().flatten(1).sum(1))  # (out, in, …) → (out,)
    remaining = {}
    for name, norms in squared_norms.items():
        score = torch.stack(norms).sum(0)
        by_group = score.view(groups, -1)  # (width,) -> (groups, width / groups)
        best = by_group.topk(new_widths[len(score)] // groups, dim=1).indices.sort(dim=1).values
        # indices within a group → indices of channels
        remaining[name] = (best + torch.arange(groups, device=best.device)[:, None] * by_group.shape[1]).flatten()
    return remaining


def decode_image(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode a pipeline's latents (B, C, h, w) to images (B, 3, h·factor, w·factor), not clamped."""
    images: Tensor = vae.decode(latent_scale(vae).denormalize(latents)).sample
    return images
