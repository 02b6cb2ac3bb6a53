"""The U-Net's layers in a form that suits the Neural Engine: same weights and function, channels first throughout.

The layout follows Apple's principles for transformers on the Neural Engine
(machinelearning.apple.com/research/neural-engine-transformers). Tokens are (1, C, 1, N), so that every linear layer is
a 1×1 convolution and transformers need no transposition. No tensor has more than four axes. QK norm and RoPE work on
(heads, D, 1, N) and split and concatenate only channels, since older engines concatenate slices of the last axis
incorrectly (github.com/sbryngelson/ANEForge, docs/op-catalog.md, slice_by_size). Only Core ML's attention takes heads
as (1, heads, N, D): its queries, keys, values and result are transposed next to it.

The timestep's cosines and sines are an input (`time_features`): half precision cannot represent 1000·t accurately
enough, and the Neural Engine has no sine before the A15.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.architecture.latent_size import LatentSize, latent_sides
from snapgen.coreml.compatibility import MAX_SIDE
from snapgen.coreml.custom_ops import group_norm, layer_norm
from snapgen.models import layers
from snapgen.models.layers import RopeTable
from snapgen.models.unet import RotaryEmbedding, UNet

# Queries and keys are multiplied by this before their norm, and its epsilon by the square. The result is the same, but
# the epsilon of 1e-6 becomes representable in half precision. Otherwise an empty caption's zero keys could give 0 / 0.
NORM_SCALE = 8.0


def time_features(timestep: Tensor | float, frequencies: int) -> Tensor:
    """The input ``time_features`` for a timestep in [0, 1]: float32 (1, frequencies).

    The values are those of `snapgen.models.layers.TimestepEmbedding`: cos(1000·t·f), then sin(1000·t·f).
    """
    steps = torch.arange(frequencies // 2, dtype=torch.float32)
    time = torch.as_tensor(timestep, dtype=torch.float32).reshape(1, 1)
    angles = 1000 * time * torch.exp(steps * (-math.log(10_000) / (frequencies // 2)))
    return torch.cat([angles.cos(), angles.sin()], -1)


class CoreMLUNet(nn.Module):
    """A U-Net for one latent size and batch size 1. The given net is modified: its layers are replaced."""

    def __init__(self, net: UNet, latent_size: LatentSize) -> None:
        super().__init__()
        self.net = cast(UNet, net.to(memory_format=torch.contiguous_format))
        lowest = len(net.down) - 1
        height, width = latent_sides(latent_size)
        for level, stage in [*enumerate(net.down), (lowest, net.mid), *enumerate(net.up)]:
            rotary = cast(RotaryEmbedding, stage.rotary_embedding)
            stage.rotary_embedding = ConstantRope(
                rotary(net.conv_in.weight.new_empty(1, 1, height >> level, width >> level))
            )
        substitute(net)

    def forward(self, sample: Tensor, time_features: Tensor, context: Tensor | None = None) -> Tensor:
        """(1, C, H, W), (1, frequencies), (1, N, context_dim) → (1, C, H, W)."""
        # (1, hidden_dim) -> (1, hidden_dim, 1, 1)
        return velocity(self.net, sample, time_embedding(self.net, time_features)[:, :, None, None], context)


def time_embedding(net: UNet, time_features: Tensor) -> Tensor:
    """The embedding of a timestep from its cosines and sines: (1, frequencies) → (1, hidden_dim)."""
    return F.silu(net.time_embedding.linear_2(F.silu(net.time_embedding.linear_1(time_features))))


def velocity(net: UNet, sample: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    """A U-Net's velocity from the embedding of the timestep, in the form that its blocks take."""
    x = net.conv_in(sample)
    skips = []
    for stage in net.down:
        x, level_skips = stage(x, time, context)
        skips.append(level_skips)
    x = net.mid(x, time, context)
    for level in reversed(range(len(net.up))):
        x = net.up[level](x, skips[level], time, context)
    return cast(Tensor, net.conv_out(F.silu(net.conv_norm_out(x))))


def substitute(root: nn.Module) -> None:
    """Replace in place every layer below ``root`` that has a counterpart in this module."""
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
    """A 1×1 convolution with the weights (out, in) of a linear layer."""
    with torch.device("meta"):
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


class ConstantRope(nn.Module):
    """Precomputed RoPE tables of a level: (1, D, 1, N)."""

    cosines: Tensor | None
    sines: Tensor | None

    def __init__(self, rotation: RopeTable | None) -> None:
        super().__init__()
        self.register_buffer("cosines", None if rotation is None else _channels_first(rotation[0]))
        self.register_buffer("sines", None if rotation is None else _channels_first(rotation[1]))

    def forward(self, x: Tensor) -> RopeTable | None:  # noqa: ARG002 - as `snapgen.models.unet.RotaryEmbedding`
        """The tables, or None without RoPE; ``x`` is ignored, since the size is fixed."""
        return None if self.cosines is None or self.sines is None else (self.cosines, self.sines)


def _channels_first(table: Tensor) -> Tensor:
    """(N, 1, D) → (1, D, 1, N)."""
    return table.permute(1, 2, 0)[:, :, None].contiguous()


def apply_rope(x: Tensor, rope: RopeTable) -> Tensor:
    """2-D RoPE as in `snapgen.models.layers`, on heads (heads, D, 1, N)."""
    a, b, c, d = x.chunk(4, 1)  # the halves of the row's channels, then of the column's
    return x * rope[0] + torch.cat([b, a, d, c], 1) * rope[1]


class GroupNorm(nn.Module):
    """Group norm by one native normalization, with scale and bias."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        norm = self.norm
        return cast(Tensor, group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


class ResidualBlock(nn.Module):
    """`snapgen.models.layers.ResidualBlock` with the timestep embedding as an image of one pixel."""

    def __init__(self, source: layers.ResidualBlock) -> None:
        super().__init__()
        self.time = pointwise(source.time_emb_proj.weight, source.time_emb_proj.bias)
        self.block = source
        substitute(source)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, in_channels, H, W), (B, time dim, 1, 1) → (B, out_channels, H, W)."""
        return self.block.forward_with_time(x, self.time(time))


class LayerNorm(nn.Module):
    """Layer norm over one axis by a custom operator; coremltools rejects a float16 one with scale and bias."""

    def __init__(self, norm: nn.LayerNorm, axis: int = 1) -> None:
        super().__init__()
        self.norm, self.axis = norm, axis

    def forward(self, x: Tensor) -> Tensor:
        """The shape does not change."""
        norm = self.norm
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return cast(Tensor, layer_norm(x, self.axis, norm.weight, bias, norm.eps))


class Transformer(nn.Module):
    """`snapgen.models.layers.SpatialTransformer` with tokens as (B, C, 1, N)."""

    def __init__(self, source: layers.SpatialTransformer) -> None:
        super().__init__()
        self.norm = GroupNorm(source.norm)
        self.proj_in = pointwise(source.proj_in.weight, source.proj_in.bias)
        self.blocks = nn.ModuleList(
            TransformerBlock(cast(layers.TransformerBlock, block)) for block in source.transformer_blocks
        )
        self.proj_out = pointwise(source.proj_out.weight, source.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        residual = x.view(len(x), x.shape[1], 1, -1)  # (B, C, H, W) -> (B, C, 1, HW)
        tokens = self.proj_in(self.norm(residual))
        for block in self.blocks:
            tokens = block(tokens, context, rope)
        return cast(Tensor, residual + self.proj_out(tokens)).view(x.shape)


class TransformerBlock(nn.Module):
    """`snapgen.models.layers.TransformerBlock` with tokens as (B, C, 1, N)."""

    def __init__(self, source: layers.TransformerBlock) -> None:
        super().__init__()
        self.norm1 = self.attn1 = self.norm2 = self.attn2 = None
        if source.norm1 is not None and source.attn1 is not None:
            self.norm1, self.attn1 = LayerNorm(source.norm1), SelfAttention(source.attn1)
        if source.norm2 is not None and source.attn2 is not None:
            self.norm2, self.attn2 = LayerNorm(source.norm2), CrossAttention(source.attn2)
        self.norm3 = LayerNorm(source.norm3)
        layer = source.ff
        self.proj_in = pointwise(layer.proj_in.weight, layer.proj_in.bias)
        self.proj_out = pointwise(layer.proj_out.weight, layer.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        """Tokens (B, C, 1, N), context (B, M, context_dim) → (B, C, 1, N)."""
        if self.norm1 is not None and self.attn1 is not None:
            x = x + self.attn1(self.norm1(x), rope)
        if self.norm2 is not None and self.attn2 is not None:
            assert context is not None
            x = x + self.attn2(self.norm2(x), context)
        value, gate = self.proj_in(self.norm3(x)).chunk(2, 1)  # (B, 2·ffn, 1, N) -> 2 × (B, ffn, 1, N)
        out: Tensor = x + self.proj_out(value * F.gelu(gate))
        return out


class SelfAttention(nn.Module):
    """Self-attention with one projection for all heads, and one norm and one RoPE for queries and keys."""

    def __init__(self, source: layers.Attention) -> None:
        super().__init__()
        self.heads, self.num_kv_heads, self.head_dim = source.heads, source.num_kv_heads, source.head_dim
        self.norm = HeadNorm.of(source, axis=1)
        queries, keys_values = source.to_q.weight, source.to_kv.weight
        if self.norm is not None:
            queries, keys_values = queries * NORM_SCALE, _scale_keys(keys_values)
        self.project = pointwise(torch.cat([queries, keys_values]), None)
        self.out = pointwise(source.to_out.weight, source.to_out.bias)

    def forward(self, x: Tensor, rope: RopeTable | None) -> Tensor:
        """(1, C, 1, N) → (1, C, 1, N)."""
        projected = self.project(x)
        qk_channels = (self.heads + self.num_kv_heads) * self.head_dim
        qk, values = torch.split(projected, [qk_channels, self.num_kv_heads * self.head_dim], 1)
        qk = qk.view(-1, self.head_dim, 1, x.shape[-1])  # -> (heads + kv heads, D, 1, N)
        if self.norm is not None:
            qk = self.norm(qk)
        if rope is not None:
            qk = apply_rope(qk, rope)
        queries, keys = torch.split(_heads_first(qk, self.head_dim), [self.heads, self.num_kv_heads], 1)
        return cast(Tensor, self.out(attend(queries, keys, _heads_first(values, self.head_dim))))


class CrossAttention(nn.Module):
    """Cross-attention to a context (1, M, C′), whose layout is kept: it is short, and MQA needs no transposition."""

    def __init__(self, source: layers.Attention) -> None:
        super().__init__()
        self.head_dim, self.num_kv_heads = source.head_dim, source.num_kv_heads
        self.query_norm = HeadNorm.of(source, axis=1, keys=False)
        self.key_norm = HeadNorm.of(source, axis=-1, queries=False)
        queries, keys_values = source.to_q.weight, source.to_kv.weight
        if self.query_norm is not None:
            queries, keys_values = queries * NORM_SCALE, _scale_keys(keys_values)
        self.queries = pointwise(queries, None)
        self.keys_values = nn.Parameter(keys_values.detach(), requires_grad=False)
        self.out = pointwise(source.to_out.weight, source.to_out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(1, C, 1, N), (1, M, C′) → (1, C, 1, N)."""
        queries = self.queries(x)
        keys_values = F.linear(context, self.keys_values)
        if self.num_kv_heads == 1:
            keys, values = keys_values[:, None].chunk(2, -1)  # (1, M, 2·D) -> (1, 1, M, 2·D) -> 2 × (1, 1, M, D)
        else:
            # (1, M, 2·kv heads·D) -> (1, M, 2·kv heads, D) -> (1, 2·kv heads, M, D) -> 2 × (1, kv heads, M, D)
            split = keys_values.view(1, -1, 2 * self.num_kv_heads, self.head_dim)
            keys, values = split.transpose(1, 2).chunk(2, 1)
        if self.query_norm is not None and self.key_norm is not None:
            queries = self.query_norm(queries.view(-1, self.head_dim, 1, x.shape[-1]))
            keys = self.key_norm(keys)
        return cast(Tensor, self.out(attend(_heads_first(queries, self.head_dim), keys, values)))


class HeadNorm(nn.Module):
    """RMSNorm of heads that are multiplied by `NORM_SCALE`, with one scale vector per head.

    The layer norm of a vector concatenated with its negative is the vector's RMSNorm: the mean is zero, and the
    variance is the mean square (huggingface.co/blog/anemll/anemll-style-rms-ane). The Neural Engine has a layer norm
    but no RMSNorm, and this way the square is never stored in half precision.

    Args:
        weight: (heads, D), each head's scale.
        eps: epsilon of the norm before scaling.
        axis: 1 for (heads, D, 1, N), -1 for (1, heads, N, D).
    """

    def __init__(self, weight: Tensor, eps: float, *, axis: int) -> None:
        super().__init__()
        # (heads, D) -> (heads, D, 1, 1) or (1, heads, 1, D)
        broadcast = weight.detach()[:, :, None, None] if axis == 1 else weight.detach()[None, :, None]
        self.weight = nn.Parameter(broadcast, requires_grad=False)
        self.eps, self.axis = eps * NORM_SCALE**2, axis
        self.register_buffer("one", torch.ones(2 * weight.shape[1]).to(weight.dtype))
        self.register_buffer("zero", torch.zeros(2 * weight.shape[1]).to(weight.dtype))
        self.one: Tensor
        self.zero: Tensor

    @classmethod
    def of(cls, source: layers.Attention, *, axis: int, queries: bool = True, keys: bool = True) -> HeadNorm | None:
        """The norm of an attention's query heads, key heads, or both in this order; None without QK norm."""
        norms = [(source.norm_q, source.heads)] * queries + [(source.norm_k, source.num_kv_heads)] * keys
        rows = [norm.weight.expand(heads, -1) for norm, heads in norms if isinstance(norm, nn.RMSNorm)]
        if not rows:
            return None
        (eps,) = {norm.eps for norm, _ in norms if isinstance(norm, nn.RMSNorm)}
        assert eps is not None
        return cls(torch.cat(rows), eps, axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize heads whose channels are along ``axis``; the shape does not change."""
        doubled = torch.cat([x, -x], self.axis)
        normalized = layer_norm(doubled, self.axis, self.one, self.zero, self.eps)
        return cast(Tensor, normalized.narrow(self.axis, 0, x.shape[self.axis]) * self.weight)


def _scale_keys(keys_values: Tensor) -> Tensor:
    """Weights of keys and values, the keys' multiplied by `NORM_SCALE`."""
    keys, values = keys_values.chunk(2)
    return torch.cat([keys * NORM_SCALE, values])


def _heads_first(x: Tensor, head_dim: int) -> Tensor:
    """Heads as (heads, D, 1, N) or (1, heads·D, 1, N) → (1, heads, N, D)."""
    return x.reshape(1, -1, head_dim, x.shape[-1]).transpose(2, 3)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of queries (B, heads, N, D) to keys and values (B, kv heads, M, D) → (B, heads·D, 1, N).

    Query heads that share a key head are concatenated as more tokens of one head, as in
    `snapgen.models.layers.Attention`. If that exceeds the Neural Engine's limit along an axis, keys and values are
    repeated instead.
    """
    batch, heads, tokens, head_dim = queries.shape
    group_size = heads // keys.shape[1]  # query heads per key head
    if group_size * tokens <= MAX_SIDE:
        merged = queries.reshape(batch, -1, group_size * tokens, head_dim)  # -> (B, kv heads, group·N, D)
        out = F.scaled_dot_product_attention(merged, keys, values).view(queries.shape)
    else:
        repeated_keys, repeated_values = repeat_heads(keys, group_size), repeat_heads(values, group_size)
        out = F.scaled_dot_product_attention(queries, repeated_keys, repeated_values)
    # (B, heads, N, D) -> (B, heads, D, N) -> (B, heads·D, 1, N)
    return out.transpose(2, 3).reshape(batch, heads * head_dim, 1, tokens)


def repeat_heads(heads: Tensor, times: int) -> Tensor:
    """Repeat each head, keeping copies adjacent: (B, heads, M, D) → (B, heads·times, M, D)."""
    return torch.cat([head for head in heads.chunk(heads.shape[1], 1) for _ in range(times)], 1) if times > 1 else heads
