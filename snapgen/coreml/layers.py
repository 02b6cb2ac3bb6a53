"""A U-Net as the Neural Engine likes it: the same weights and the same function, channels first throughout.

After Apple's principles for transformers there (machinelearning.apple.com/research/neural-engine-transformers):
tokens stay (1, C, 1, N), so that every linear layer is a 1×1 convolution and nothing is transposed around a
transformer; no tensor has more than four axes; what works on heads, QK norm and RoPE, sees (heads, D, 1, N) and cuts
and joins channels alone (older engines join pieces of the last axis wrongly: github.com/sbryngelson/ANEForge,
docs/op-catalog.md, slice_by_size). Only Core ML's attention wants heads as (1, heads, N, D): its queries, keys, values
and result are transposed where they meet it.

The timestep's cosines and sines come in as an input (`time_features`): half precision cannot tell 1000·t from its
neighbours, and the Neural Engine has no sine before the A15.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.coreml.compatibility import LONGEST
from snapgen.coreml.custom_ops import group_norm, layer_norm
from snapgen.models import layers
from snapgen.models.layers import RopeTable
from snapgen.models.unet import RotaryEmbedding, UNet

# Queries and keys reach their norm times this, its epsilon times the square: the result is the same, but the epsilon
# of 1e-6 becomes one that half precision can hold. Without it the zero keys of an empty caption might be 0 / 0.
NORM_SCALE = 8.0


def time_features(timestep: Tensor | float, frequencies: int) -> Tensor:
    """The input ``time_features`` of a timestep in [0, 1]: float32 (1, frequencies), as in `parts.TimeFeatures`."""
    steps = torch.arange(frequencies // 2, dtype=torch.float32)
    time = torch.as_tensor(timestep, dtype=torch.float32).reshape(1, 1)
    angles = 1000 * time * torch.exp(steps * (-math.log(10_000) / (frequencies // 2)))
    return torch.cat([angles.cos(), angles.sin()], -1)


class CoreMLUNet(nn.Module):
    """A U-Net at one latent size and batch 1; takes over the net, whose layers it replaces by their counterparts."""

    def __init__(self, net: UNet, latent_size: int) -> None:
        super().__init__()
        self.net = cast(UNet, net.to(memory_format=torch.contiguous_format))
        lowest = len(net.down) - 1
        for level, stage in [*enumerate(net.down), (lowest, net.mid), *enumerate(net.up)]:
            size = latent_size >> level
            turn = cast(RotaryEmbedding, stage.turn)
            stage.turn = ConstantRope(turn(net.conv_in.weight.new_empty(1, 1, size, size)))
        substitute(net)

    def forward(self, sample: Tensor, time_features: Tensor, context: Tensor | None = None) -> Tensor:
        """(1, C, H, W), (1, frequencies), (1, N, context width) → (1, C, H, W)."""
        net = self.net
        time = F.silu(net.time.linear2(F.silu(net.time.linear1(time_features))))[:, :, None, None]
        x = net.conv_in(sample)
        skips = []
        for stage in net.down:
            x, level_skips = stage(x, time, context)
            skips.append(level_skips)
        x = net.mid(x, time, context)
        for level in reversed(range(len(net.up))):
            x = net.up[level](x, skips[level], time, context)
        return cast(Tensor, net.conv_out(F.silu(net.norm_out(x))))


def substitute(root: nn.Module) -> None:
    """Replaces, in place, every layer below ``root`` that has a counterpart here."""
    for name, module in list(root.named_children()):
        setattr(root, name, _counterpart(module))


def _counterpart(module: nn.Module) -> nn.Module:
    if isinstance(module, layers.SpatialTransformer):
        return Transformer(module)
    if isinstance(module, nn.GroupNorm):
        return GroupNorm(module)
    if isinstance(module, layers.ResidualBlock):
        return ResidualBlock(module)
    substitute(module)
    return module


def pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A linear layer's weights as a 1×1 convolution."""
    with torch.device("meta"):
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


class ConstantRope(nn.Module):
    """A stage's RoPE tables, (1, D, 1, N), computed beforehand."""

    cosines: Tensor | None
    sines: Tensor | None

    def __init__(self, rotation: RopeTable | None) -> None:
        super().__init__()
        self.register_buffer("cosines", None if rotation is None else _channels_first(rotation[0]))
        self.register_buffer("sines", None if rotation is None else _channels_first(rotation[1]))

    def forward(self, x: Tensor) -> RopeTable | None:  # noqa: ARG002 - as `snapgen.models.unet.RotaryEmbedding`
        """The tables of a stage whose size is known."""
        return None if self.cosines is None or self.sines is None else (self.cosines, self.sines)


def _channels_first(table: Tensor) -> Tensor:
    """N 1 D → 1 D 1 N."""
    return table.permute(1, 2, 0)[:, :, None].contiguous()


def rotated(x: Tensor, by: RopeTable) -> Tensor:
    """`parts.rotated` of (heads, D, 1, N)."""
    a, b, c, d = x.chunk(4, 1)
    return x * by[0] + torch.cat([b, a, d, c], 1) * by[1]


class GroupNorm(nn.Module):
    """One native normalisation and its affine."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        norm = self.norm
        return cast(Tensor, group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


class ResidualBlock(nn.Module):
    """`parts.ResidualBlock` whose timestep is an image of one pixel."""

    def __init__(self, source: layers.ResidualBlock) -> None:
        super().__init__()
        self.time = pointwise(source.time.weight, source.time.bias)
        self.block = source
        substitute(source)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, inside, H, W), (B, time width, 1, 1) → (B, outside, H, W)."""
        return self.block.shifted(x, self.time(time))


class ChannelNorm(nn.Module):
    """A layer norm of tokens whose channels come first."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 1, N) → (B, C, 1, N)."""
        return cast(Tensor, layer_norm(x, 1, self.norm.weight, self.norm.bias, self.norm.eps))


class Transformer(nn.Module):
    """`parts.Transformer` over (B, C, 1, N)."""

    def __init__(self, source: layers.SpatialTransformer) -> None:
        super().__init__()
        self.norm = GroupNorm(source.norm)
        self.proj_in = pointwise(source.proj_in.weight, source.proj_in.bias)
        self.blocks = nn.ModuleList(TransformerBlock(cast(layers.TransformerBlock, block)) for block in source.blocks)
        self.proj_out = pointwise(source.proj_out.weight, source.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        before = x.view(len(x), x.shape[1], 1, -1)
        tokens = self.proj_in(self.norm(before))
        for block in self.blocks:
            tokens = block(tokens, context, turn)
        return cast(Tensor, before + self.proj_out(tokens)).view(x.shape)


class TransformerBlock(nn.Module):
    """`parts.TransformerBlock` over (B, C, 1, N)."""

    def __init__(self, source: layers.TransformerBlock) -> None:
        super().__init__()
        self.norm1 = self.attend_self = self.norm2 = self.attend_context = None
        if source.norm1 is not None and source.attend_self is not None:
            self.norm1, self.attend_self = ChannelNorm(source.norm1), SelfAttention(source.attend_self)
        if source.norm2 is not None and source.attend_context is not None:
            self.norm2, self.attend_context = ChannelNorm(source.norm2), CrossAttention(source.attend_context)
        self.norm3 = ChannelNorm(source.norm3)
        layer = source.feed_forward
        self.expand = pointwise(layer.expand.weight, layer.expand.bias)
        self.contract = pointwise(layer.contract.weight, layer.contract.bias)

    def forward(self, x: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        """Tokens (B, C, 1, N), context (B, M, context width) → (B, C, 1, N)."""
        if self.norm1 is not None and self.attend_self is not None:
            x = x + self.attend_self(self.norm1(x), turn)
        if self.norm2 is not None and self.attend_context is not None:
            assert context is not None
            x = x + self.attend_context(self.norm2(x), context)
        value, gate = self.expand(self.norm3(x)).chunk(2, 1)
        out: Tensor = x + self.contract(value * F.gelu(gate))
        return out


class SelfAttention(nn.Module):
    """`parts.Attention` of tokens to themselves: one projection, and one norm and one turn of queries and keys."""

    def __init__(self, source: layers.Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = source.heads, source.kv_heads, source.head_width
        self.norm = HeadNorm.of(source, axis=1)
        queries, pair = source.queries.weight, source.keys_values.weight
        if self.norm is not None:
            queries, pair = queries * NORM_SCALE, _scaled_keys(pair)
        self.project = pointwise(torch.cat([queries, pair]), None)
        self.out = pointwise(source.out.weight, source.out.bias)

    def forward(self, x: Tensor, turn: RopeTable | None) -> Tensor:
        """(1, C, 1, N) → (1, C, 1, N)."""
        every = self.project(x)
        own = (self.heads + self.kv_heads) * self.head_width
        turned, values = torch.split(every, [own, self.kv_heads * self.head_width], 1)
        turned = turned.view(-1, self.head_width, 1, x.shape[-1])
        if self.norm is not None:
            turned = self.norm(turned)
        if turn is not None:
            turned = rotated(turned, turn)
        queries, keys = torch.split(_tokens_last(turned, self.head_width), [self.heads, self.kv_heads], 1)
        return cast(Tensor, self.out(attend(queries, keys, _tokens_last(values, self.head_width))))


class CrossAttention(nn.Module):
    """`parts.Attention` of tokens to a context, which stays (1, M, C′): its keys are few, and MQA's need no move."""

    def __init__(self, source: layers.Attention) -> None:
        super().__init__()
        self.head_width, self.kv_heads = source.head_width, source.kv_heads
        self.query_norm = HeadNorm.of(source, axis=1, keys=False)
        self.key_norm = HeadNorm.of(source, axis=-1, queries=False)
        queries, pair = source.queries.weight, source.keys_values.weight
        if self.query_norm is not None:
            queries, pair = queries * NORM_SCALE, _scaled_keys(pair)
        self.queries = pointwise(queries, None)
        self.keys_values = nn.Parameter(pair.detach(), requires_grad=False)
        self.out = pointwise(source.out.weight, source.out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(1, C, 1, N), (1, M, C′) → (1, C, 1, N)."""
        queries = self.queries(x)
        pair = F.linear(context, self.keys_values)
        if self.kv_heads == 1:
            keys, values = pair[:, None].chunk(2, -1)
        else:
            keys, values = pair.view(1, -1, 2 * self.kv_heads, self.head_width).transpose(1, 2).chunk(2, 1)
        if self.query_norm is not None and self.key_norm is not None:
            queries = self.query_norm(queries.view(-1, self.head_width, 1, x.shape[-1]))
            keys = self.key_norm(keys)
        return cast(Tensor, self.out(attend(_tokens_last(queries, self.head_width), keys, values)))


class HeadNorm(nn.Module):
    """RMSNorm of heads that come in times `NORM_SCALE`, each head with its own scale, as (heads, D, 1, N).

    The layer norm of a vector joined with its negative is its RMSNorm: the mean is zero, the variance the mean square
    (huggingface.co/blog/anemll/anemll-style-rms-ane). The Neural Engine has a layer norm and no RMSNorm, and the
    square never stands in half precision by itself.

    Args:
        weight: (heads, D), each head's scale.
        eps: of the norm before scaling.
        axis: 1 for (heads, D, 1, N), -1 for (1, heads, N, D).
    """

    def __init__(self, weight: Tensor, eps: float, *, axis: int) -> None:
        super().__init__()
        placed = weight.detach()[:, :, None, None] if axis == 1 else weight.detach()[None, :, None]
        self.weight = nn.Parameter(placed, requires_grad=False)
        self.eps, self.axis = eps * NORM_SCALE**2, axis
        self.register_buffer("one", torch.ones(2 * weight.shape[1]).to(weight.dtype))
        self.register_buffer("zero", torch.zeros(2 * weight.shape[1]).to(weight.dtype))
        self.one: Tensor
        self.zero: Tensor

    @classmethod
    def of(cls, source: layers.Attention, *, axis: int, queries: bool = True, keys: bool = True) -> HeadNorm | None:
        """Of an attention's query heads, its key heads, or the ones and then the others; None without QK norm."""
        norms = [(source.query_norm, source.heads)] * queries + [(source.key_norm, source.kv_heads)] * keys
        rows = [norm.weight.expand(heads, -1) for norm, heads in norms if isinstance(norm, nn.RMSNorm)]
        if not rows:
            return None
        (eps,) = {norm.eps for norm, _ in norms if isinstance(norm, nn.RMSNorm)}
        assert eps is not None
        return cls(torch.cat(rows), eps, axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        """Heads, the head's width along ``axis``."""
        joined = torch.cat([x, -x], self.axis)
        normal = layer_norm(joined, self.axis, self.one, self.zero, self.eps)
        return cast(Tensor, normal.narrow(self.axis, 0, x.shape[self.axis]) * self.weight)


def _scaled_keys(pair: Tensor) -> Tensor:
    """Weights of keys and values, the keys' times `NORM_SCALE`."""
    keys, values = pair.chunk(2)
    return torch.cat([keys * NORM_SCALE, values])


def _tokens_last(x: Tensor, head_width: int) -> Tensor:
    """Heads as (heads, D, 1, N) or (1, heads · D, 1, N) → 1 heads N D."""
    return x.reshape(1, -1, head_width, x.shape[-1]).transpose(2, 3)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of heads (B, heads, N, D) to (B, kv heads, M, D) → (B, heads · D, 1, N).

    Queries that share a key head are laid end to end as more tokens of that head, as `parts.Attention` does. Where
    that would be more than any Neural Engine takes along an axis, keys and values are repeated instead.
    """
    batch, heads, tokens, width = queries.shape
    shared = heads // keys.shape[1]
    if shared * tokens <= LONGEST:
        merged = queries.reshape(batch, -1, shared * tokens, width)
        out = F.scaled_dot_product_attention(merged, keys, values).view(queries.shape)
    else:
        out = F.scaled_dot_product_attention(queries, repeated(keys, shared), repeated(values, shared))
    return out.transpose(2, 3).reshape(batch, heads * width, 1, tokens)


def repeated(heads: Tensor, times: int) -> Tensor:
    """Each of (B, heads, M, D) so many times over, in place."""
    return torch.cat([head for head in heads.chunk(heads.shape[1], 1) for _ in range(times)], 1) if times > 1 else heads
