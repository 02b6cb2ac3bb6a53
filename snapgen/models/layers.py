"""Layers of a U-Net: convolutions, residual blocks, attention, transformers, upsampling, timestep embedding.

Feature maps are ``(B, C, H, W)`` in channels-last memory, so that their tokens ``(B, H·W, C)`` are views, not copies.

Initial weights preserve the variance of activations; the last layer of every residual branch is zero, so that each
branch starts as the identity (see `zero_init_layers`). The papers do not give their initialization: this is our choice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.models.onednn import Depthwise, Linear, Pointwise

ROPE_THETA = 10_000.0

RopeTable = tuple[Tensor, Tensor]
"""Cosines and signed sines, each ``(N, 1, head_dim)``; see `rope_table`."""


def conv3x3(
    in_channels: int, out_channels: int, kind: Literal["standard", "separable"], *, stride: int = 1
) -> nn.Module:
    """3×3 convolution, standard or separable.

    A separable one is a depthwise 3×3 and a pointwise convolution with nothing between (SnapGen, arXiv 2412.09619,
    section 3.1). The depthwise convolution has no bias, as that of the pointwise one makes it redundant.
    """
    if kind == "standard":
        return nn.Conv2d(in_channels, out_channels, 3, stride, 1)
    depthwise = Depthwise(in_channels, stride)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=Pointwise(in_channels, out_channels)))


class ResidualBlock(nn.Module):
    """Residual block: norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut.

    With ``time_at`` "expanded" the timestep's projection is added between the convolutions; with "output" after the
    second one, at the output's width. By our parameter count SnapGen's published sizes need the latter; adding it at
    that point is our choice.
    """

    enabled = True
    """Whether the block is active; a disabled block is only its shortcut (see `snapgen.models.subnetworks`)."""
    skipped = False
    """Whether block dropout skips the block in the current training step; ignored in evaluation mode."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int,
        conv: Literal["standard", "separable"],
        groups: int,
        time_dim: int,
        time_at: Literal["expanded", "output"],
    ) -> None:
        super().__init__()
        self.time_at = time_at
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = conv3x3(in_channels, hidden_channels, conv)
        self.time_emb_proj = Linear(time_dim, hidden_channels if time_at == "expanded" else out_channels)
        self.norm2 = nn.GroupNorm(groups, hidden_channels)
        self.conv2 = conv3x3(hidden_channels, out_channels, conv)
        self.conv_shortcut = Pointwise(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` (B, in_channels, H, W), timestep embedding after SiLU (B, time_dim) → (B, out_channels, H, W)."""
        time_shift = self.time_emb_proj(time)[:, :, None, None]  # (B, time_dim) → (B, C', 1, 1)
        return self.forward_with_time(x, time_shift)

    def forward_with_time(self, x: Tensor, time_shift: Tensor) -> Tensor:
        """`forward` with the timestep already projected: (B, C', 1, 1), C' being the width where it is added."""
        if not self.enabled or (self.skipped and self.training):
            return self.conv_shortcut(x)  # type: ignore[no-any-return]
        # (B, in_channels, H, W) → (B, hidden_channels, H, W)
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_at == "expanded":
            hidden = hidden + time_shift
        # (B, hidden_channels, H, W) → (B, out_channels, H, W)
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.time_at == "output":
            hidden = hidden + time_shift
        out: Tensor = self.conv_shortcut(x) + hidden
        return out


def rope_table(height: int, width: int, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> RopeTable:
    """Tables of 2-D rotary embeddings for a grid of tokens, each (height·width, 1, head_dim).

    The first half of a head is rotated by the token's row, the second by its column. Within each half, channel ``i`` is
    paired with ``i + head_dim / 4`` (half-split layout) and rotated by ``position · θ^(−i / (head_dim / 4))``. The
    sines carry the signs that `apply_rope` needs.
    """
    quarter = head_dim // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(ROPE_THETA) / quarter))  # θ^(−i / quarter)
    positions = torch.arange(max(height, width), device=device, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # (positions, head_dim / 4)
    rows = angles[:height, None].expand(-1, width, -1)  # (H, head_dim / 4) → (H, W, head_dim / 4)
    columns = angles[None, :width].expand(height, -1, -1)
    angles = torch.cat([rows, rows, columns, columns], -1).reshape(height * width, 1, head_dim)  # (H·W, 1, head_dim)
    # Signs by negation, not by a constant table: copying one from the host would make CUDA wait.
    a, b, c, d = angles.sin().chunk(4, -1)
    return angles.cos().to(dtype), torch.cat([-a, b, -c, d], -1).to(dtype)


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate heads (B, N, heads, head_dim) by the positions of their tokens."""
    cosines, signed_sines = table
    a, b, c, d = x.chunk(4, -1)
    return x * cosines + torch.cat([b, a, d, c], -1) * signed_sines


class Attention(nn.Module):
    """Multi-head attention in which groups of query heads share a key/value head: MHSA, GQA or MQA.

    Only the output projection has a bias. The queries of a group are laid out as additional tokens of their key/value
    head, which is a view for MHSA and MQA. Keys and values are never copied, every exporter supports this form, and on
    CPU it is as fast as ``enable_gqa`` (for MQA, forward and backward, a fifth faster).

    Args:
        dim: width of the tokens that attend.
        source_dim: width of the tokens that are attended to.
        head_dim: width of a head.
        num_kv_heads: number of key/value heads; None: one per query head.
        qk_norm: whether queries and keys pass an RMSNorm over the width of a head.
    """

    def __init__(self, dim: int, source_dim: int, *, head_dim: int, num_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.heads = dim // head_dim
        self.num_kv_heads = num_kv_heads or self.heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_kv = Linear(source_dim, 2 * self.num_kv_heads * head_dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor, rope: RopeTable | None = None) -> Tensor:
        """Let ``x`` (B, N, C) attend to ``source`` (B, M, C′) → (B, N, C); ``rope`` rotates queries and keys."""
        batch, tokens, dim = x.shape
        group = self.heads // self.num_kv_heads  # query heads per key/value head
        # (B, N, C) → (B, N, heads, D); (B, M, C′) → two of (B, M, kv, D)
        queries = self.norm_q(self.to_q(x).view(batch, tokens, self.heads, self.head_dim))
        keys, values = self.to_kv(source).view(batch, -1, 2 * self.num_kv_heads, self.head_dim).chunk(2, 2)
        keys = self.norm_k(keys)
        if rope is not None:
            queries, keys = apply_rope(queries, rope), apply_rope(keys, rope)
        # (B, N, kv·group, D) → (B, kv, N·group, D)
        queries = queries.view(batch, tokens, self.num_kv_heads, group, self.head_dim).transpose(1, 2).flatten(2, 3)
        hidden = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2))
        # (B, kv, N·group, D) → (B, N, kv, group, D) → (B, N, C)
        hidden = hidden.view(batch, self.num_kv_heads, tokens, group, self.head_dim).transpose(1, 2)
        out: Tensor = self.to_out(hidden.reshape(batch, tokens, dim))
        return out


class GEGLUFeedForward(nn.Module):
    """GEGLU feed-forward layers: C → 2·hidden_dim, value · GELU(gate), hidden_dim → C."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj_in = Linear(dim, 2 * hidden_dim)
        self.proj_out = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        value, gate = self.proj_in(x).chunk(2, -1)  # (B, N, 2·hidden_dim) → two of (B, N, hidden_dim)
        out: Tensor = self.proj_out(value * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention, feed-forward, each with LayerNorm and residual add.

    Either attention can be absent.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int,
        context_dim: int | None,
        self_attention: bool,
        head_dim: int,
        num_kv_heads: int | None,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.norm1 = self.attn1 = self.norm2 = self.attn2 = None
        if self_attention:
            self.norm1 = nn.LayerNorm(dim)
            self.attn1 = Attention(dim, dim, head_dim=head_dim, num_kv_heads=num_kv_heads, qk_norm=qk_norm)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = Attention(dim, context_dim, head_dim=head_dim, num_kv_heads=num_kv_heads, qk_norm=qk_norm)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLUFeedForward(dim, hidden_dim)

    def forward(self, x: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        """Tokens (B, N, C), context (B, M, context_dim) → (B, N, C)."""
        if self.norm1 is not None and self.attn1 is not None:
            hidden = self.norm1(x)
            x = x + self.attn1(hidden, hidden, rope)
        if self.norm2 is not None and self.attn2 is not None:
            assert context is not None
            x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map: norm, projection, transformer blocks, projection, residual add.

    Diffusers calls it ``Transformer2DModel``.
    """

    enabled = True
    """Whether the transformer is active; a disabled one is the identity."""
    skipped = False
    """Whether block dropout skips the transformer in the current training step; ignored in evaluation mode."""

    def __init__(self, channels: int, blocks: list[TransformerBlock], *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        if not self.enabled or (self.skipped and self.training):
            return x
        height, width = x.shape[2:]
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, C, H, W) → (B, H·W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, rope)
        # (B, H·W, C) → (B, C, H, W)
        out: Tensor = x + self.proj_out(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return out


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a convolution."""

    def __init__(self, channels: int, kind: Literal["standard", "separable"]) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class TimestepEmbedding(nn.Module):
    """Embedding of the timestep: cosines and sines of 1000·t at geometric frequencies, an MLP, and SiLU.

    Args:
        embed_dim: number of cosines and sines together.
        hidden_dim: width of the MLP and of its output.
    """

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.linear_1 = Linear(embed_dim, hidden_dim)
        self.linear_2 = Linear(hidden_dim, hidden_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (B,) in [0, 1] → (B, hidden_dim)."""
        half = self.embed_dim // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        # (B,) → (B, embed_dim / 2): 1000·t · 10000^(−i / half)
        angles = 1000 * timestep.float()[:, None] * torch.exp(steps * (-math.log(10_000) / half))
        # two of (B, embed_dim / 2) → (B, embed_dim)
        features = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear_1.weight.dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(features))))


def zero_init_layers(root: nn.Module) -> list[nn.Module]:
    """Layers whose weights start at zero: the last of every residual branch, and those added to a branch's output."""
    zero_init: list[nn.Module] = []
    for module in root.modules():
        if isinstance(module, ResidualBlock):
            zero_init.append(module.conv2[-1] if isinstance(module.conv2, nn.Sequential) else module.conv2)
            if module.time_at == "output":
                zero_init.append(module.time_emb_proj)
        elif isinstance(module, SpatialTransformer):
            zero_init.append(module.proj_out)
    return zero_init
