"""Breakdown of a net's cost by level, by type of block and by operator, from one pass on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from archsearch.cost.counter import CostItem, count_network
from archsearch.cost.meta_device import on_meta_device
from snapgen.architecture.schema import Architecture
from snapgen.autoencoders import tiny_decoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.config import Config
from snapgen.models import layers as blocks, unet
from snapgen.models.unet import UNet

ENDS, TIME, OTHER = "ends", "time", "other"

KINDS = {
    "residual": "residual blocks: convolutions, activations, the shortcut and its addition",
    "sampling": "down- and upsampling",
    "self_attention": "projections, RoPE and attention among the positions of the latent",
    "cross_attention": "projections and attention to the context",
    "feed_forward": "feed-forward layers",
    "norm": "all norms, in any block",
    "projection": "1×1 layers around transformers, and those that widen a level without residual blocks",
    TIME: "the timestep embedding and its projection into residual blocks",
    ENDS: "the first and the last convolution",
    OTHER: "everything between blocks: residual additions in transformers, concatenation of skips, the last activation",
}
"""Types of blocks and their contents."""

_KIND_BY_TYPE: dict[type[nn.Module], str] = {
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

_KIND_BY_MEMBER: dict[tuple[type[nn.Module], str], str] = {
    (unet.DownLevel, "downsample"): "sampling",
    (unet.DownLevel, "widen"): "projection",
    (blocks.TransformerBlock, "attn1"): "self_attention",
    (blocks.TransformerBlock, "attn2"): "cross_attention",
    (blocks.SpatialTransformer, "proj_in"): "projection",
    (blocks.SpatialTransformer, "proj_out"): "projection",
    (blocks.ResidualBlock, "time_emb_proj"): TIME,
    (UNet, "conv_in"): ENDS,
    (UNet, "conv_out"): ENDS,
    (TinyDecoder, "conv_out"): ENDS,
}


class Breakdown(Config):
    """A net's total cost and its breakdown; `archsearch.cost.counter.CostItem` explains how the items add up."""

    total: CostItem
    by_stage: dict[str, CostItem]
    """Under ``time`` (the timestep's MLP), ``ends`` (first and last convolution, with the last norm and activation),
    ``down[i]``, ``mid`` and ``up[i]``, in the order of the pass. A level includes its resampling convolution; the
    concatenation of skips counts for ``up[i]``."""
    by_kind: dict[str, CostItem]
    """Cost of each type of block that the net has, under the names in `KINDS`."""
    macs_by_operator: dict[str, int]
    """MACs of each operator: convolution, linear, attention, matmul."""


def breakdown(arch: Architecture, latent_size: int, *, context_tokens: int = 77) -> Breakdown:
    """Break down the cost of one forward pass at batch size 1; arguments as for `archsearch.cost.counter.cost`."""
    net, *inputs = on_meta_device(arch, latent_size, context_tokens)
    down = {stage: f"down[{level}]" for level, stage in enumerate(net.down)}
    up = {stage: f"up[{level}]" for level, stage in enumerate(net.up)}
    stages = {net.time_embedding: TIME, **down, net.mid: "mid", **dict(reversed(up.items()))}
    return _break_down(net, inputs, stages, kinds={})


def decoder_breakdown(config: Mapping[str, Any], latent_size: int) -> Breakdown:
    """Break down the cost of a tiny decoder, whose levels are ``up[i]``; level 0 has the highest resolution.

    Args:
        config: constructor arguments of `TinyDecoder`.
        latent_size: height and width of the latent.
    """
    with torch.device("meta"):
        net = TinyDecoder(**config).eval()
        latent = torch.empty(1, net.config.latent_channels, latent_size, latent_size)
    layers = iter(net.layers)
    kinds = {next(layers): ENDS}
    stages = {next(layers): "mid" for _ in range(net.config.mid_blocks)}
    for level, num_blocks in reversed(list(enumerate(net.config.blocks))):
        stages |= {next(layers): f"up[{level}]" for _ in range(num_blocks + bool(level))}  # all but level 0 upsample
    return _break_down(net, [latent], stages, kinds)


class _Group(NamedTuple):
    stage: str
    kind: str


def _break_down(
    net: nn.Module, inputs: Sequence[Tensor], stages: Mapping[nn.Module, str], kinds: Mapping[nn.Module, str]
) -> Breakdown:
    """Count a pass by stage and kind; modules outside of all stages belong to the ends."""
    count = count_network(net, *inputs, groups=_groups(net, _Group(ENDS, OTHER), stages, kinds))
    items = {cast(_Group, group): item for group, item in count.by_group.items()}
    present = [kind for kind in KINDS if any(group.kind == kind for group in items)]
    return Breakdown(
        total=CostItem.total(items.values()),
        by_stage={
            stage: CostItem.total(item for group, item in items.items() if group.stage == stage)
            for stage in dict.fromkeys([ENDS, *stages.values()])
        },
        by_kind={kind: CostItem.total(item for group, item in items.items() if group.kind == kind) for kind in present},
        macs_by_operator=count.macs,
    )


def _groups(
    module: nn.Module, group: _Group, stages: Mapping[nn.Module, str], kinds: Mapping[nn.Module, str]
) -> dict[nn.Module, _Group]:
    """Groups of a module and all its descendants; a child inherits its parent's group unless it has its own."""
    groups = {module: group}
    for name, child in module.named_children():
        kind = (
            kinds.get(child) or _KIND_BY_MEMBER.get((type(module), name)) or _KIND_BY_TYPE.get(type(child), group.kind)
        )
        groups |= _groups(child, _Group(stages.get(child, group.stage), kind), stages, kinds)
    return groups
