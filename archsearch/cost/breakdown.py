"""Where a net's cost lies: by stage, by kind of block and by operator, from one pass on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from archsearch.cost.counter import CostItem, count_network
from archsearch.cost.meta_device import on_meta_device
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import tiny_decoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.config import Config
from snapgen.models import layers as blocks
from snapgen.models import unet
from snapgen.models.unet import UNet

ENDS, TIME, OTHER = "ends", "time", "other"

KINDS = {
    "residual": "residual blocks: convolutions, activations, the shortcut and its addition",
    "sampling": "down- and upsampling",
    "self_attention": "projections, RoPE and attention of a grid to itself",
    "cross_attention": "projections and attention of a grid to the context",
    "feed_forward": "feed-forward layers",
    "norm": "every norm, wherever it stands",
    "projection": "1×1 layers around transformers, and the one that widens a stage without residual blocks",
    TIME: "the timestep's features and their projection into residual blocks",
    ENDS: "the first and the last convolution",
    OTHER: "what stands between blocks: residual additions in transformers, the joining of skips, the last activation",
}
"""The kinds of block, and what is in each."""

_OF_TYPE: dict[type[nn.Module], str] = {
    blocks.ResidualBlock: "residual",
    tiny_decoder.SeparableResBlock: "residual",
    blocks.Upsample: "sampling",
    tiny_decoder.Upsample: "sampling",
    unet.RotaryEmbedding: "self_attention",
    blocks.GEGLUFeedForward: "feed_forward",
    nn.GroupNorm: "norm",
    nn.LayerNorm: "norm",
    nn.RMSNorm: "norm",
    blocks.TimestepEmbedding: TIME,
}

_OF_MEMBER: dict[tuple[type[nn.Module], str], str] = {
    (unet.DownStage, "sampler"): "sampling",
    (unet.DownStage, "widen"): "projection",
    (blocks.TransformerBlock, "attend_self"): "self_attention",
    (blocks.TransformerBlock, "attend_context"): "cross_attention",
    (blocks.SpatialTransformer, "proj_in"): "projection",
    (blocks.SpatialTransformer, "proj_out"): "projection",
    (blocks.ResidualBlock, "time"): TIME,
    (UNet, "conv_in"): ENDS,
    (UNet, "conv_out"): ENDS,
    (TinyDecoder, "conv_out"): ENDS,
}


class Breakdown(Config):
    """A net's cost and where it lies. See `archsearch.cost.counter.CostItem` for the numbers and for what they add up
    to."""

    total: CostItem
    by_stage: dict[str, CostItem]
    """Under ``time`` (the timestep's MLP), ``ends`` (first and last convolution, with the last norm and activation),
    ``down[i]``, ``mid`` and ``up[i]``, in the order of the pass. A stage has its blocks and its sampler; the joining of
    skips is in ``up[i]``."""
    by_kind: dict[str, CostItem]
    """Under the names of `KINDS`; kinds that the net has nothing of are left out."""
    macs_by_operator: dict[str, int]


def breakdown(arch: Architecture, latent_size: int, *, context_tokens: int = 77) -> Breakdown:
    """Where the cost of one forward pass at batch 1 lies; arguments as in `archsearch.cost.counter.cost`."""
    net, *inputs = on_meta_device(arch, latent_size, context_tokens)
    down = {stage: f"down[{level}]" for level, stage in enumerate(net.down)}
    up = {stage: f"up[{level}]" for level, stage in enumerate(net.up)}
    stages = {net.time: TIME, **down, net.mid: "mid", **dict(reversed(up.items()))}
    return _broken_down(net, inputs, stages, kinds={})


def decoder_breakdown(config: Mapping[str, Any], latent_size: int) -> Breakdown:
    """The same for a tiny decoder, whose levels are ``up[i]``, the highest resolution first.

    Args:
        config: arguments of `TinyDecoder`.
        latent_size: height and width of the latent.
    """
    with torch.device("meta"):
        net = TinyDecoder(**config).eval()
        latent = torch.empty(1, net.config.latent_channels, latent_size, latent_size)
    layers = iter(net.layers)
    kinds = {next(layers): ENDS}
    stages = {next(layers): "mid" for _ in range(net.config.mid_blocks)}
    for level, blocks_there in reversed(list(enumerate(net.config.blocks))):
        stages |= {next(layers): f"up[{level}]" for _ in range(blocks_there + bool(level))}
    return _broken_down(net, [latent], stages, kinds)


class _Place(NamedTuple):
    stage: str
    kind: str


def _broken_down(
    net: nn.Module, inputs: Sequence[Tensor], stages: Mapping[nn.Module, str], kinds: Mapping[nn.Module, str]
) -> Breakdown:
    """A pass by the places of modules; what is in no stage is of the ends."""
    found = count_network(net, *inputs, places=_places(net, _Place(ENDS, OTHER), stages, kinds))
    parts = {cast(_Place, place): part for place, part in found.parts.items()}
    present = [kind for kind in KINDS if any(place.kind == kind for place in parts)]
    return Breakdown(
        total=_merged(parts.values()),
        by_stage={
            stage: _merged(part for place, part in parts.items() if place.stage == stage)
            for stage in dict.fromkeys([ENDS, *stages.values()])
        },
        by_kind={kind: _merged(part for place, part in parts.items() if place.kind == kind) for kind in present},
        macs_by_operator=found.macs,
    )


def _places(
    module: nn.Module, here: _Place, stages: Mapping[nn.Module, str], kinds: Mapping[nn.Module, str]
) -> dict[nn.Module, _Place]:
    """The module's place and those of all within: its owner's, but for what is said of itself."""
    places = {module: here}
    for name, child in module.named_children():
        kind = kinds.get(child) or _OF_MEMBER.get((type(module), name)) or _OF_TYPE.get(type(child), here.kind)
        places |= _places(child, _Place(stages.get(child, here.stage), kind), stages, kinds)
    return places


def _merged(parts: Iterable[CostItem]) -> CostItem:
    parts = list(parts)
    return CostItem(
        params=sum(part.params for part in parts),
        macs=sum(part.macs for part in parts),
        activation_bytes=max((part.activation_bytes for part in parts), default=0),
        written_bytes=sum(part.written_bytes for part in parts),
    )
