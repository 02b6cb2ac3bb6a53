"""The parts a U-Net is built from: convolutions, residual blocks, transformers, samplers.

Images are ``(B, C, H, W)`` in channels-last memory, so that their tokens ``(B, H·W, C)`` are views, never copies.

Initial weights keep the variance of what passes through; the last layer of every residual branch is zero, so that each
branch begins as the identity (see `zero_init_layers`). The papers do not give theirs: this is our choice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snapgen.models.onednn import Linear, Pointwise

ROPE_THETA = 10_000.0

RopeTable = tuple[Tensor, Tensor]
"""Cosines and signed sines, each ``(N, 1, head width)``: see `rope_table`."""


def conv3x3(inside: int, outside: int, kind: Literal["plain", "separable"], *, stride: int = 1) -> nn.Module:
    """A 3×3 convolution, or a depthwise 3×3 and a pointwise one with nothing between (arXiv 2412.09619, section 3.1).

    The depthwise part has no bias: the pointwise one's takes its place.
    """
    if kind == "plain":
        return nn.Conv2d(inside, outside, 3, stride, 1)
    return nn.Sequential(nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), Pointwise(inside, outside))


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut.

    With ``time_at`` "expanded" the timestep is added between the convs; with "output" after the second, at the output's
    width. The paper's sizes need the latter, by our count; where it is added there is our choice.
    """

    runs = True
    """Whether it is more than its shortcut; `snapgen.models.subnetworks` turns blocks off."""
    dropped = False
    """Whether it is left out of this training step; evaluation knows nothing of it."""

    def __init__(
        self,
        inside: int,
        outside: int,
        *,
        between: int,
        conv: Literal["plain", "separable"],
        groups: int,
        time_width: int,
        time_at: Literal["expanded", "output"],
    ) -> None:
        super().__init__()
        self.time_at = time_at
        self.norm1 = nn.GroupNorm(groups, inside)
        self.conv1 = conv3x3(inside, between, conv)
        self.time = Linear(time_width, between if time_at == "expanded" else outside)
        self.norm2 = nn.GroupNorm(groups, between)
        self.conv2 = conv3x3(between, outside, conv)
        self.shortcut = Pointwise(inside, outside) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` (B, inside, H, W), ``time`` (B, time width), already through SiLU → (B, outside, H, W)."""
        return self.shifted(x, self.time(time)[:, :, None, None])

    def shifted(self, x: Tensor, shift: Tensor) -> Tensor:
        """As `forward`, of the timestep's projection (B, width where it is added, 1, 1)."""
        if not self.runs or (self.dropped and self.training):
            return self.shortcut(x)  # type: ignore[no-any-return]
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_at == "expanded":
            hidden = hidden + shift
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.time_at == "output":
            hidden = hidden + shift
        out: Tensor = self.shortcut(x) + hidden
        return out


def rope_table(height: int, width: int, head_width: int, *, like: Tensor) -> RopeTable:
    """Tables of 2-D RoPE for a grid: the first half of a head turns with the row, the second with the column.

    Each half pairs its channel ``i`` with ``i + head_width / 4`` (half-split layout), turned by
    ``position · θ^(−i / (head_width / 4))``. The sines carry the sign of their pair's member, for `apply_rope`.
    """
    quarter = head_width // 4
    steps = torch.arange(quarter, device=like.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(ROPE_THETA) / quarter))
    places = torch.arange(max(height, width), device=like.device, dtype=torch.float32)
    angles = places[:, None] * frequencies
    rows = angles[:height, None].expand(-1, width, -1)
    columns = angles[None, :width].expand(height, -1, -1)
    angles = torch.cat([rows, rows, columns, columns], -1).reshape(height * width, 1, head_width)
    a, b, c, d = angles.sin().chunk(4, -1)  # no table of signs: it would be copied from the host, which CUDA waits for
    return angles.cos().to(like.dtype), torch.cat([-a, b, -c, d], -1).to(like.dtype)


def apply_rope(x: Tensor, by: RopeTable) -> Tensor:
    """Heads ``(B, N, heads, head width)`` turned by their token's position."""
    a, b, c, d = x.chunk(4, -1)
    return x * by[0] + torch.cat([b, a, d, c], -1) * by[1]


class Attention(nn.Module):
    """Multi-head attention with one key/value head for every ``heads / kv_heads`` query heads; no bias but the last.

    Queries that share a key/value head are laid end to end as more tokens of that head: a view for MHSA and MQA. Keys
    and values are never copied, every exporter knows the form, and on CPU it is as fast as ``enable_gqa`` (forward and
    backward of MQA: a fifth faster).
    """

    def __init__(self, width: int, source_width: int, *, head_width: int, kv_heads: int | None, norm: bool) -> None:
        super().__init__()
        self.head_width = head_width
        self.heads = width // head_width
        self.kv_heads = kv_heads or self.heads
        self.queries = Linear(width, width, bias=False)
        self.keys_values = Linear(source_width, 2 * self.kv_heads * head_width, bias=False)
        self.query_norm = nn.RMSNorm(head_width, eps=1e-6) if norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_width, eps=1e-6) if norm else nn.Identity()
        self.out = Linear(width, width)

    def forward(self, x: Tensor, source: Tensor, turn: RopeTable | None = None) -> Tensor:
        """``x`` (B, N, C) attends to ``source`` (B, M, C′) → (B, N, C)."""
        batch, tokens, width = x.shape
        shared = self.heads // self.kv_heads
        queries = self.query_norm(self.queries(x).view(batch, tokens, self.heads, self.head_width))
        keys, values = self.keys_values(source).view(batch, -1, 2 * self.kv_heads, self.head_width).chunk(2, 2)
        keys = self.key_norm(keys)
        if turn is not None:
            queries, keys = apply_rope(queries, turn), apply_rope(keys, turn)
        # B N (kv shared) D → B kv (N shared) D
        queries = queries.view(batch, tokens, self.kv_heads, shared, self.head_width).transpose(1, 2).flatten(2, 3)
        hidden = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2))
        hidden = hidden.view(batch, self.kv_heads, tokens, shared, self.head_width).transpose(1, 2)
        out: Tensor = self.out(hidden.reshape(batch, tokens, width))
        return out


class GEGLUFeedForward(nn.Module):
    """GEGLU: C → 2·inner, inner → C."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = Linear(width, 2 * inner)
        self.contract = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        value, gate = self.expand(x).chunk(2, -1)
        out: Tensor = self.contract(value * F.gelu(gate))
        return out


class TransformerBlock(nn.Module):
    """LN-SA-add, LN-CA-add, LN-FFN-add; either attention can be absent."""

    def __init__(
        self,
        width: int,
        *,
        inner: int,
        context_width: int | None,
        self_attention: bool,
        head_width: int,
        kv_heads: int | None,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.norm1 = self.attend_self = self.norm2 = self.attend_context = None
        if self_attention:
            self.norm1 = nn.LayerNorm(width)
            self.attend_self = Attention(width, width, head_width=head_width, kv_heads=kv_heads, norm=qk_norm)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attend_context = Attention(
                width, context_width, head_width=head_width, kv_heads=kv_heads, norm=qk_norm
            )
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GEGLUFeedForward(width, inner)

    def forward(self, x: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        """Tokens (B, N, C), context (B, M, context width) → (B, N, C)."""
        if self.norm1 is not None and self.attend_self is not None:
            hidden = self.norm1(x)
            x = x + self.attend_self(hidden, hidden, turn)
        if self.norm2 is not None and self.attend_context is not None:
            assert context is not None
            x = x + self.attend_context(self.norm2(x), context)
        out: Tensor = x + self.feed_forward(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Norm, projection, transformer blocks over the grid's tokens, projection, residual add."""

    runs = True
    dropped = False
    """Both as of a residual block."""

    def __init__(self, width: int, blocks: list[TransformerBlock], *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = Linear(width, width)
        self.blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        if not self.runs or (self.dropped and self.training):
            return x
        height, width = x.shape[2:]
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context, turn)
        out: Tensor = x + self.proj_out(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return out


class Upsample(nn.Module):
    """Nearest ×2, then a convolution."""

    def __init__(self, width: int, kind: Literal["plain", "separable"]) -> None:
        super().__init__()
        self.conv = conv3x3(width, width, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class TimestepEmbedding(nn.Module):
    """Cosines and sines of 1000·t at geometric frequencies, then an MLP; the result has passed SiLU."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear1 = Linear(frequencies, width)
        self.linear2 = Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (B,) in [0, 1] → (B, width)."""
        half = self.frequencies // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angles = 1000 * timestep.float()[:, None] * torch.exp(steps * (-math.log(10_000) / half))
        features = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


def zero_init_layers(root: nn.Module) -> list[nn.Module]:
    """The layers that end a residual branch, and those that add to its end: they begin at zero."""
    ends: list[nn.Module] = []
    for module in root.modules():
        if isinstance(module, ResidualBlock):
            ends.append(module.conv2[-1] if isinstance(module.conv2, nn.Sequential) else module.conv2)
            if module.time_at == "output":
                ends.append(module.time)
        elif isinstance(module, SpatialTransformer):
            ends.append(module.proj_out)
    return ends
