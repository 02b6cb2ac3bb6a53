"""An AutoencoderKL with a thinner decoder: channels cut uniformly, the weights of those that stay inherited.

SnapFusion's decoder (arXiv 2306.00980, section 3.2) is Stable Diffusion's with half of its channels. Which channels it
keeps is not published; here they are those that are written with the largest weights.
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

from snapgen.errors import InputError

HALF = 0.5
"""SnapFusion's ratio."""


class PrunedAutoencoderKL(AutoencoderKL):  # type: ignore[misc]
    """diffusers' AutoencoderKL, whose decoder has widths of its own: in diffusers' the encoder's are the decoder's.

    Wherever diffusers takes an AutoencoderKL it takes this one; this class reads what it saves.

    Args:
        decoder_channels: as ``block_out_channels``, of the decoder alone.
        config: of `AutoencoderKL`.
    """

    def __init__(self, *, decoder_channels: Sequence[int], **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(decoder_channels=tuple(decoder_channels))
        self.decoder = _decoder(self.config, decoder_channels)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers reads a class's fields off its signature, which here names only the one that is new."""
        keys: set[str] = AutoencoderKL._get_init_keys(input_class)
        return keys | AutoencoderKL._get_init_keys(AutoencoderKL) if input_class is PrunedAutoencoderKL else keys


def prune_decoder(vae: AutoencoderKL, ratio: float, *, source: str = "autoencoder") -> PrunedAutoencoderKL:
    """The autoencoder with its decoder's channels cut, encoder and latents as they were.

    Of every width w in g groups of a norm, w/g · (1 − ratio) channels of each group stay, rounded to a whole number.
    Channels that residual connections add up go together. Of each group those stay whose weights, in all convolutions
    that write them, have the largest norms. The attention's queries are scaled so that its logits keep their size.

    Args:
        ratio: of the channels that go, in [0, 1); 0 gives the same decoder.
        source: what to call the autoencoder in an error.

    Raises:
        InputError: if the ratio is out of range or leaves a group without a channel, or the decoder is of another kind.
    """
    _check(vae, source)
    kept = {width: pruned_width(width, groups(vae), ratio) for width in _widths(vae)}
    config = {key: value for key, value in vae.config.items() if key[0] != "_" and key != "decoder_channels"}
    with torch.device("meta"):
        found = PrunedAutoencoderKL(**config, decoder_channels=[kept[width] for width in _widths(vae)])
    for part in ("encoder", "quant_conv", "post_quant_conv"):
        setattr(found, part, copy.deepcopy(getattr(vae, part)))
    found.decoder.load_state_dict(_inherited(vae.decoder, kept, groups(vae)), assign=True)
    return cast(PrunedAutoencoderKL, found.train(vae.training))


def pruned_width(width: int, groups: int, ratio: float) -> int:
    """How many of so many channels stay: as many of each group.

    Raises:
        InputError: if the ratio is not in [0, 1), or nothing stays.
    """
    if not 0 <= ratio < 1:
        raise InputError(
            "ratio", f"{ratio} is no share of channels to cut", "use 0 or more, below 1; SnapFusion's is 0.5"
        )
    group = width // groups
    stay = math.floor(group * (1 - ratio) + 0.5)
    if stay < 1:
        most = math.floor(100 * (1 - 0.5 / group)) / 100
        problem = f"{ratio} leaves no channel of {width} in {groups} groups"
        raise InputError("ratio", problem, f"use at most {most}")
    return stay * groups


def groups(vae: AutoencoderKL) -> int:
    """Of the decoder's norms."""
    return int(vae.config.norm_num_groups)


def _widths(vae: AutoencoderKL) -> Sequence[int]:
    widths: Sequence[int] = vae.config.get("decoder_channels") or vae.config.block_out_channels
    return widths


def _check(vae: AutoencoderKL, source: str) -> None:
    other = [kind for kind in vae.config.up_block_types if kind != "UpDecoderBlock2D"]
    if other:
        raise InputError(
            source,
            f"is a decoder of {other[0]}",
            "give one of UpDecoderBlock2D alone, as SD's is",
            place="up_block_types",
        )


def _decoder(config: Mapping[str, Any], channels: Sequence[int]) -> Decoder:
    """With a convolution in each shortcut where the whole decoder's width changes: diffusers makes none between widths
    that rounding made equal.
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
    whole = list(reversed(config["block_out_channels"]))
    for stage, before, width in zip(decoder.up_blocks[1:], whole, whole[1:], strict=False):
        block = stage.resnets[0]
        if before != width and block.conv_shortcut is None:
            block.conv_shortcut = nn.Conv2d(block.in_channels, block.out_channels, 1)
    return decoder


class _Ends(NamedTuple):
    """Which sets of channels a layer writes and reads; None: those of latents and images, which stay."""

    written: str | None
    read: str | None


def layers(decoder: Decoder) -> dict[str, _Ends]:
    """Every layer of a decoder by its path, with its sets of channels, each named by the first layer that writes it.

    Channels that are added up are of one set; a norm writes the set that it reads.
    """
    return dict(_walk(decoder))


def _walk(decoder: Decoder) -> Iterator[tuple[str, _Ends]]:
    trunk = "conv_in"
    yield trunk, _Ends(trunk, None)
    attentions = [*decoder.mid_block.attentions, *[None] * len(decoder.mid_block.resnets)]
    for i, (block, attention) in enumerate(zip(decoder.mid_block.resnets, [None, *attentions], strict=False)):
        if attention is not None:
            yield from _attention(f"mid_block.attentions.{i - 1}", trunk)
        trunk = yield from _residual(f"mid_block.resnets.{i}", block, trunk)
    for level, stage in enumerate(decoder.up_blocks):
        for i, block in enumerate(stage.resnets):
            trunk = yield from _residual(f"up_blocks.{level}.resnets.{i}", block, trunk)
        if stage.upsamplers is not None:
            after = f"up_blocks.{level}.upsamplers.0.conv"
            yield after, _Ends(after, trunk)
            trunk = after
    yield "conv_norm_out", _Ends(trunk, trunk)
    yield "conv_out", _Ends(None, trunk)


def _residual(path: str, block: ResnetBlock2D, trunk: str) -> Generator[tuple[str, _Ends], None, str]:
    """Returns the set of its output: the trunk's, unless a convolution stands in the shortcut."""
    inner, out = f"{path}.conv1", trunk if block.conv_shortcut is None else f"{path}.conv2"
    yield f"{path}.norm1", _Ends(trunk, trunk)
    yield inner, _Ends(inner, trunk)
    yield f"{path}.norm2", _Ends(inner, inner)
    yield f"{path}.conv2", _Ends(out, inner)
    if block.conv_shortcut is not None:
        yield f"{path}.conv_shortcut", _Ends(out, trunk)
    return out


def _attention(path: str, trunk: str) -> Iterator[tuple[str, _Ends]]:
    """Queries and keys are matched channel by channel: one set."""
    yield f"{path}.group_norm", _Ends(trunk, trunk)
    for layer, written in (("to_q", "to_q"), ("to_k", "to_q"), ("to_v", "to_v")):
        yield f"{path}.{layer}", _Ends(f"{path}.{written}", trunk)
    yield f"{path}.to_out.0", _Ends(trunk, f"{path}.to_v")


@torch.no_grad()
def _inherited(decoder: Decoder, kept: Mapping[int, int], groups: int) -> dict[str, Tensor]:
    """The weights of the channels that stay."""
    ends = layers(decoder)
    stay = _staying(decoder, ends, kept, groups)
    found = {}
    for name, tensor in decoder.state_dict().items():
        layer = ends[name.rpartition(".")[0]]
        if layer.written is not None:
            tensor = tensor[stay[layer.written]]
        if tensor.ndim > 1 and layer.read is not None:
            tensor = tensor[:, stay[layer.read]]
        found[name] = tensor.clone()
    for path, module in decoder.named_modules():
        if isinstance(module, Attention):
            # Its logits are divided by √width, of which less is left.
            scale = math.sqrt(len(stay[f"{path}.to_q"]) / module.to_q.out_features)
            for name in (f"{path}.to_q.weight", f"{path}.to_q.bias"):
                found[name] *= scale
    return found


def _staying(decoder: Decoder, ends: Mapping[str, _Ends], kept: Mapping[int, int], groups: int) -> dict[str, Tensor]:
    """The channels of each set that stay, in order."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for path, (written, _) in ends.items():
        weight = decoder.get_parameter(f"{path}.weight")
        if written is not None and weight.ndim > 1:
            squares[written].append(weight.double().square().flatten(1).sum(1))
    stay = {}
    for name, found in squares.items():
        score = torch.stack(found).sum(0)
        by_group = score.view(groups, -1)
        best = by_group.topk(kept[len(score)] // groups, dim=1).indices.sort(dim=1).values
        stay[name] = (best + torch.arange(groups, device=best.device)[:, None] * by_group.shape[1]).flatten()
    return stay


def decode_image(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a pipeline gives them to images (B, 3, H · factor, W · factor), not clamped."""
    found: Tensor = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    return found
