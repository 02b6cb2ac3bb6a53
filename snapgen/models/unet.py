"""U-Net built from an architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from snapgen import devices, seeding
from snapgen.architecture.schema import Architecture, BlocksConfig
from snapgen.config import parse_config
from snapgen.diffusion.process import PredictionType
from snapgen.io import pretrained
from snapgen.io.prediction_type import read_prediction_type
from snapgen.models import layers
from snapgen.models.layers import ResidualBlock, RopeTable, SpatialTransformer, TransformerBlock, Upsample, conv3x3
from snapgen.models.names import earlier_name, rename_weights
from snapgen.models.onednn import Pointwise
from snapgen.models.timestep_range import check_timestep


class UNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """U-Net that predicts the velocity of a latent at a timestep, given a context.

    Initial weights come from seed 0; `init_weights` draws others. Saving and loading are diffusers' own
    (`save_pretrained`, `from_pretrained`), with the architecture in ``config.json``.

    Args:
        arch: the architecture, or its JSON as a mapping.
        prediction_type: what the net is trained to predict; None: unknown.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True  # of each `Layer` separately

    def __init__(self, arch: Architecture | Mapping[str, Any], prediction_type: PredictionType | None = None) -> None:
        super().__init__()
        if not isinstance(arch, Architecture):
            arch = parse_config(arch, Architecture, source=self.config_name, place="arch")
        self.arch = arch
        self.needs_context = self.arch.has_cross_attention
        self.register_to_config(arch=self.arch.model_dump(mode="json"), prediction_type=prediction_type)
        with torch.random.fork_rng(devices=[]):  # torch's initial weights, which `init_weights` replaces
            self._build()
        self.init_weights(0)
        self.to(memory_format=torch.channels_last)

    def _build(self) -> None:
        channels = self.arch.down[0].channels
        self.time_embedding = layers.TimestepEmbedding(self.arch.time.embed_dim, self.arch.time.hidden_dim)
        self.conv_in = nn.Conv2d(self.arch.latent_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(self.arch, level) for level in range(len(self.arch.down)))
        self.mid = MidLevel(self.arch)
        self.up = nn.ModuleList(UpLevel(self.arch, level) for level in range(len(self.arch.up)))
        self.conv_norm_out = nn.GroupNorm(self.arch.norm_groups, self.arch.up[0].channels)
        self.conv_out = nn.Conv2d(self.arch.up[0].channels, self.arch.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        """Predict the velocity of noisy latents.

        Args:
            sample: noisy latents (B, C, H, W); H and W are multiples of ``arch.stride``.
            timestep: (B,), or one for the batch, in [0, 1]; 0 is data, 1 is noise.
            context: (B, N, ``arch.context_dim``); ignored, and may be None, if the net has no cross-attention.

        Returns:
            The velocity (B, C, H, W).

        Raises:
            ValueError: if a shape does not fit the architecture, the context is missing, or a timestep is out of range,
                as diffusers' from 0 to 1000 are.
        """
        return self.head(self.forward_features(sample, timestep, context))

    def forward_features(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        """Features before the output layers, from the arguments of `forward`: (B, channels of ``up[0]``, H, W)."""
        self._check(sample, context)
        check_timestep(timestep)
        time = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        time = self.time_embedding(time.expand(len(sample)))  # (B,) → (B, hidden_dim)
        x = self.conv_in(sample.contiguous(memory_format=torch.channels_last))  # (B, C, H, W) → (B, C_0, H, W)
        skips: list[list[Tensor]] = []
        for level_down in self.down:
            x, level_skips = level_down(x, time, context)
            skips.append(level_skips)
        x = self.mid(x, time, context)
        for level in reversed(range(len(self.up))):  # from the lowest resolution to the highest
            x = self.up[level](x, skips[level], time, context)
        return x  # type: ignore[no-any-return]

    def head(self, features: Tensor) -> Tensor:
        """Output layers: features (B, channels of ``up[0]``, H, W) → velocity (B, C, H, W)."""
        return self.conv_out(F.silu(self.conv_norm_out(features)))  # type: ignore[no-any-return]

    @property
    def prediction_type(self) -> PredictionType | None:
        """Prediction type that the net is trained for, an entry of its configuration; None: unknown."""
        stated: PredictionType | None = self.config["prediction_type"]
        return stated

    @prediction_type.setter
    def prediction_type(self, prediction_type: PredictionType | None) -> None:
        self.register_to_config(prediction_type=prediction_type)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' ``from_pretrained``, with the weights moved to channels-last memory, which files do not record."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).to(memory_format=torch.channels_last)
        return loaded

    def _fix_state_dict_keys_on_load(self, state_dict: MutableMapping[str, Any]) -> None:
        """Diffusers' hook on loading: weights under names of earlier versions get the present ones."""
        rename_weights(state_dict, self.state_dict())

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        rename_weights(state_dict, self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            raise ValueError("the net has cross-attention; pass a context")
        if context.shape[-1] != self.arch.context_dim:
            raise ValueError(f"the context is {context.shape[-1]} wide; the net was built for {self.arch.context_dim}")

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew, each from ``seed`` and its module's name.

        Nets that share a layer therefore start with the same weights there. Weights are normal with variance
        1 / fan-in; biases are zero and norms the identity; ``conv_out`` and the last layers of residual branches are
        zero.
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
            generator = torch.Generator(module.weight.device).manual_seed(seeding.derive_seed(seed, _seed_name(name)))
            # One output's weights are weight[0], (in, …): σ = 1 / √fan-in.
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)


def load_unet(folder: Path) -> UNet:
    """Load a U-Net from its folder, in float32 on the CPU and in evaluation mode.

    Raises:
        InputError: if a file is missing or damaged, describes another class, or holds weights of another net.
    """
    unet: UNet = pretrained.load_net(folder, UNet)
    unet.prediction_type = read_prediction_type(folder)
    unet.to(memory_format=torch.channels_last)
    return unet


def check_memory(arch: Architecture, *, copies: int, source: str | Path | None = None) -> None:
    """Check, before a net is made, that there is memory for so many copies of its weights in float32.

    Raises:
        InputError: if not.
    """
    with torch.device("meta"):
        count = UNet(arch).num_parameters()
    devices.check_memory(4 * copies * count, source or f"architecture {arch.id}")


TRAINING_COPIES = 4
"""Copies of the weights that a training holds at the least: the net, its average, gradients and momenta."""


def _seed_name(module: str) -> str:
    """Name from which a module's weights are seeded: its first one, which of resampling convolutions is ``sampler``."""
    return re.sub(r"\.(down|up)sample\b", ".sampler", earlier_name(module))


class Layer(nn.Module):
    """Layer of a level: residual blocks, usually one, then transformers.

    Gradient checkpointing stores only the inputs of a layer and computes its activations again in the backward pass.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # both set by diffusers' `enable_gradient_checkpointing`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        residuals: list[ResidualBlock],
        transformers: list[SpatialTransformer],
    ) -> None:
        super().__init__()
        widens = not residuals and in_channels != out_channels
        self.shortcut = Pointwise(in_channels, out_channels) if widens else None
        self.residual = residuals[0] if residuals else None
        self.copies = nn.ModuleList(residuals[1:])
        self.transformers = nn.ModuleList(transformers)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._run, x, time, context, rope)
        return self._run(x, time, context, rope)

    def _run(self, x: Tensor, time: Tensor, context: Tensor | None, rope: RopeTable | None) -> Tensor:
        if self.shortcut is not None:
            x = self.shortcut(x)
        if self.residual is not None:
            x = self.residual(x, time)
        for residual in self.copies:
            x = residual(x, time)
        for transformer in self.transformers:
            x = transformer(x, context, rope)
        return x


class DownLevel(nn.Module):
    """A level on the way down: its layers, then the downsampling convolution, except in the last level."""

    def __init__(self, arch: Architecture, level: int) -> None:
        super().__init__()
        config = arch.down[level]
        in_channels = arch.skip_channels(level)[0]
        self.rotary_embedding = RotaryEmbedding(arch, config)
        widens = config.num_residual_slots == 0 and in_channels != config.channels
        self.widen = Pointwise(in_channels, config.channels) if widens else nn.Identity()
        self.layers = _layers(arch, config, config.channels, arch.down_in_channels(level))
        last = level == len(arch.down) - 1
        self.downsample = None if last else conv3x3(config.channels, config.channels, config.conv, stride=2)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """(B, in_channels, H, W) → (B, channels, H/2, W/2) and the skips: the input, then each layer's output."""
        skips = [x]
        rope = self.rotary_embedding(x)
        x = self.widen(x)
        for layer in self.layers:
            x = layer(x, time, context, rope)
            skips.append(x)
        return x if self.downsample is None else self.downsample(x), skips


class MidLevel(nn.Module):
    """The middle of the net, at the lowest resolution: residual blocks with transformers between them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.down[-1].channels
        self.rotary_embedding = RotaryEmbedding(arch, arch.mid)
        self.layers = _layers(arch, arch.mid, channels, [channels] * arch.mid.num_residual_slots, is_mid=True)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        rope = self.rotary_embedding(x)
        for layer in self.layers:
            x = layer(x, time, context, rope)
        return x


class UpLevel(nn.Module):
    """A level on the way up: its layers, then upsampling, except in level 0.

    Each layer takes a skip, concatenated on channels, while there are any.
    """

    def __init__(self, arch: Architecture, level: int) -> None:
        super().__init__()
        config = arch.up[level]
        self.rotary_embedding = RotaryEmbedding(arch, config)
        self.layers = _layers(arch, config, config.channels, arch.up_in_channels(level))
        self.upsample = Upsample(config.channels, config.conv) if level else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor | None) -> Tensor:
        """(B, in_channels, H, W) and the level's skips, oldest first → (B, channels, 2H, 2W); H, W in level 0."""
        rope = self.rotary_embedding(x)
        for i, layer in enumerate(self.layers):
            if i < len(skips):
                x = torch.cat([x, skips[-1 - i]], 1)  # (B, C + C_skip, H, W), the newest skip first
            x = layer(x, time, context, rope)
        return x if self.upsample is None else self.upsample(x)


class RotaryEmbedding(nn.Module):
    """Provider of a level's RoPE tables; gives None where the level has no self-attention or the net no RoPE."""

    def __init__(self, arch: Architecture, blocks: BlocksConfig) -> None:
        super().__init__()
        self.head_dim = blocks.head_dim if arch.rope and blocks.has_transformers and blocks.self_attention else 0

    def forward(self, x: Tensor) -> RopeTable | None:
        """Tables for the grid of ``x`` (B, C, H, W)."""
        if not self.head_dim:
            return None
        return layers.rope_table(x.shape[2], x.shape[3], self.head_dim, device=x.device, dtype=x.dtype)


def _layers(
    arch: Architecture, blocks: BlocksConfig, channels: int, all_in_channels: list[int], *, is_mid: bool = False
) -> nn.ModuleList:
    """Build the layers of a level on one way, or of the middle.

    Args:
        all_in_channels: input width of each layer that can hold residual blocks.
    """
    counts = blocks.layer_counts(is_mid=is_mid)
    return nn.ModuleList(
        Layer(
            in_channels,
            channels,
            [_residual(arch, blocks, in_channels if index == 0 else channels, channels) for index in range(residuals)],
            [_transformer(arch, blocks, channels) for _ in range(transformers)],
        )
        for in_channels, (residuals, transformers) in zip(
            all_in_channels or [channels] * len(counts), counts, strict=True
        )
    )


def _residual(arch: Architecture, blocks: BlocksConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        hidden_channels=blocks.hidden_channels(in_channels, out_channels),
        conv=blocks.conv,
        groups=arch.norm_groups,
        time_dim=arch.time.hidden_dim,
        time_at=arch.time.projection,
    )


def _transformer(arch: Architecture, blocks: BlocksConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(
        channels,
        [
            TransformerBlock(
                channels,
                hidden_dim=blocks.ffn_dim(channels),
                context_dim=arch.context_dim if blocks.cross_attention else None,
                self_attention=blocks.self_attention,
                head_dim=blocks.head_dim,
                num_kv_heads=blocks.num_kv_heads,
                qk_norm=arch.qk_norm,
            )
            for _ in range(blocks.transformer_depth)
        ],
        groups=arch.norm_groups,
    )
