"""The U-Net that an architecture describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from snapgen import seeding
from snapgen.architecture.schema import Architecture, BlocksConfig
from snapgen.models import layers
from snapgen.models.layers import ResidualBlock, RopeTable, SpatialTransformer, TransformerBlock, Upsample, conv3x3
from snapgen.models.onednn import Pointwise


class UNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the velocity of a latent at a timestep, given a context.

    Weights begin from seed 0; `initialise` draws others. Files are diffusers' own (`save_pretrained`,
    `from_pretrained`), with the architecture in the configuration.

    Args:
        arch: the architecture, or its JSON as a mapping.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True  # each `Layer` by itself

    def __init__(self, arch: Architecture | Mapping[str, Any]) -> None:
        super().__init__()
        self.arch = arch if isinstance(arch, Architecture) else Architecture.model_validate(dict(arch))
        self.needs_context = self.arch.has_cross_attention
        self.register_to_config(arch=self.arch.model_dump(mode="json"))
        with torch.random.fork_rng(devices=[]):  # torch's own initial weights, drawn over by `initialise`
            self._build()
        self.initialise(0)
        self.to(memory_format=torch.channels_last)

    def _build(self) -> None:
        width = self.arch.down[0].channels
        self.time = layers.TimestepEmbedding(self.arch.time.frequencies, self.arch.time.width)
        self.conv_in = nn.Conv2d(self.arch.latent_channels, width, 3, padding=1)
        self.down = nn.ModuleList(DownStage(self.arch, level) for level in range(len(self.arch.down)))
        self.mid = MidStage(self.arch)
        self.up = nn.ModuleList(UpStage(self.arch, level) for level in range(len(self.arch.up)))
        self.norm_out = nn.GroupNorm(self.arch.norm_groups, self.arch.up[0].channels)
        self.conv_out = nn.Conv2d(self.arch.up[0].channels, self.arch.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        """The velocity at ``sample``.

        Args:
            sample: noisy latents (B, C, H, W); H and W multiples of ``arch.stride``.
            timestep: (B,) or one for all, in [0, 1]; 0 is data, 1 is noise.
            context: (B, N, ``arch.context_width``), or None; ignored where no stage has cross-attention.

        Returns:
            (B, C, H, W).
        """
        return self.head(self.trunk(sample, timestep, context))

    def trunk(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        """What the last up stage makes of the same arguments: (B, channels of ``up[0]``, H, W)."""
        self._check(sample, context)
        time = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        time = self.time(time.expand(len(sample)))
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips: list[list[Tensor]] = []
        for stage in self.down:
            x, level_skips = stage(x, time, context)
            skips.append(level_skips)
        x = self.mid(x, time, context)
        for level in reversed(range(len(self.up))):
            x = self.up[level](x, skips[level], time, context)
        return x  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """The velocity in the trunk's features: (B, channels of ``up[0]``, H, W) → (B, C, H, W)."""
        return self.conv_out(F.silu(self.norm_out(features)))  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own, with the weights in channels-last memory again, which files do not keep."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).to(memory_format=torch.channels_last)
        return loaded

    def _check(self, sample: Tensor, context: Tensor | None) -> None:
        channels, height, width = sample.shape[1:]
        stride = self.arch.stride
        if channels != self.arch.latent_channels:
            raise ValueError(f"the sample has {channels} channels; the net was built for {self.arch.latent_channels}")
        if height % stride or width % stride:
            raise ValueError(f"the sample is {height}×{width}; both sides must be multiples of {stride}")
        if not self.needs_context:
            return
        if context is None:
            raise ValueError("the net has cross-attention; give it a context")
        if context.shape[-1] != self.arch.context_width:
            raise ValueError(
                f"the context is {context.shape[-1]} wide; the net was built for {self.arch.context_width}"
            )

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draws all weights anew: each from ``seed`` and its own name, so nets that share a layer begin alike there.

        Matrices are normal with variance 1 / inputs; biases zero; norms the identity; the ends of residual branches
        and ``conv_out`` zero.
        """
        zero = {id(module) for module in [*layers.zero_init_layers(self), self.conv_out]}
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear) or module.weight.is_meta:
                continue
            if module.bias is not None:
                module.bias.zero_()
            if id(module) in zero:
                module.weight.zero_()
                continue
            generator = torch.Generator(module.weight.device).manual_seed(seeding.derive_seed(seed, name))
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)


class Layer(nn.Module):
    """Residual blocks, mostly one, then transformers; with gradient checkpointing only its inputs are kept."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # both set by diffusers' `enable_gradient_checkpointing`

    def __init__(
        self, inside: int, outside: int, residuals: list[ResidualBlock], transformers: list[SpatialTransformer]
    ) -> None:
        super().__init__()
        self.shortcut = Pointwise(inside, outside) if not residuals and inside != outside else None
        self.residual = residuals[0] if residuals else None
        self.copies = nn.ModuleList(residuals[1:])
        self.transformers = nn.ModuleList(transformers)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        """(B, inside, H, W) → (B, outside, H, W)."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._run, x, time, context, turn)
        return self._run(x, time, context, turn)

    def _run(self, x: Tensor, time: Tensor, context: Tensor | None, turn: RopeTable | None) -> Tensor:
        if self.shortcut is not None:
            x = self.shortcut(x)
        if self.residual is not None:
            x = self.residual(x, time)
        for residual in self.copies:
            x = residual(x, time)
        for transformer in self.transformers:
            x = transformer(x, context, turn)
        return x


class DownStage(nn.Module):
    """A level's layers on the way down, then its downsampler unless it is the last."""

    def __init__(self, arch: Architecture, level: int) -> None:
        super().__init__()
        stage = arch.down[level]
        inside = arch.skips(level)[0]
        self.turn = RotaryEmbedding(arch, stage)
        widens = stage.places == 0 and inside != stage.channels
        self.widen = Pointwise(inside, stage.channels) if widens else nn.Identity()
        self.layers = _layers(arch, stage, stage.channels, arch.down_inputs(level))
        last = level == len(arch.down) - 1
        self.sampler = None if last else conv3x3(stage.channels, stage.channels, stage.conv, stride=2)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """(B, inside, H, W) → (B, channels, H/2, W/2) and the level's skips: its input, then every layer's output."""
        skips = [x]
        turn = self.turn(x)
        x = self.widen(x)
        for layer in self.layers:
            x = layer(x, time, context, turn)
            skips.append(x)
        return x if self.sampler is None else self.sampler(x), skips


class MidStage(nn.Module):
    """The blocks at the lowest resolution: transformers stand between residual blocks."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.down[-1].channels
        self.turn = RotaryEmbedding(arch, arch.mid)
        self.layers = _layers(arch, arch.mid, channels, [channels] * arch.mid.places, ends_plain=True)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        turn = self.turn(x)
        for layer in self.layers:
            x = layer(x, time, context, turn)
        return x


class UpStage(nn.Module):
    """A level's layers on the way up, each taking a skip while there are any; then its upsampler, but for level 0."""

    def __init__(self, arch: Architecture, level: int) -> None:
        super().__init__()
        stage = arch.up[level]
        self.turn = RotaryEmbedding(arch, stage)
        self.layers = _layers(arch, stage, stage.channels, arch.up_inputs(level))
        self.sampler = Upsample(stage.channels, stage.conv) if level else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor | None) -> Tensor:
        """(B, inside, H, W) and the level's skips, oldest first → (B, channels, 2H, 2W)."""
        turn = self.turn(x)
        for i, layer in enumerate(self.layers):
            if i < len(skips):
                x = torch.cat([x, skips[-1 - i]], 1)
            x = layer(x, time, context, turn)
        return x if self.sampler is None else self.sampler(x)


class RotaryEmbedding(nn.Module):
    """The RoPE tables of a stage, or None where it has no use for them."""

    def __init__(self, arch: Architecture, blocks: BlocksConfig) -> None:
        super().__init__()
        self.head_width = blocks.head_width if arch.rope and blocks.has_transformers and blocks.self_attention else 0

    def forward(self, x: Tensor) -> RopeTable | None:
        """The tables for a grid like ``x`` (B, C, H, W)."""
        if not self.head_width:
            return None
        return layers.rope_table(x.shape[2], x.shape[3], self.head_width, like=x)


def _layers(
    arch: Architecture, blocks: BlocksConfig, channels: int, inputs: list[int], *, ends_plain: bool = False
) -> nn.ModuleList:
    """The layers of a stage or of the middle; ``inputs``: widths at its places for residual blocks."""
    dealt = blocks.dealt(ends_plain=ends_plain)
    return nn.ModuleList(
        Layer(
            inside,
            channels,
            [_residual(arch, blocks, inside if first == 0 else channels, channels) for first in range(residuals)],
            [_transformer(arch, blocks, channels) for _ in range(transformers)],
        )
        for inside, (residuals, transformers) in zip(inputs or [channels] * len(dealt), dealt, strict=True)
    )


def _residual(arch: Architecture, blocks: BlocksConfig, inside: int, outside: int) -> ResidualBlock:
    return ResidualBlock(
        inside,
        outside,
        between=blocks.expanded(inside, outside),
        conv=blocks.conv,
        groups=arch.norm_groups,
        time_width=arch.time.width,
        time_at=arch.time.projection,
    )


def _transformer(arch: Architecture, blocks: BlocksConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(
        channels,
        [
            TransformerBlock(
                channels,
                inner=blocks.ffn_width(channels),
                context_width=arch.context_width if blocks.cross_attention else None,
                self_attention=blocks.self_attention,
                head_width=blocks.head_width,
                kv_heads=blocks.kv_heads,
                qk_norm=arch.qk_norm,
            )
            for _ in range(blocks.transformer_depth)
        ],
        groups=arch.norm_groups,
    )
