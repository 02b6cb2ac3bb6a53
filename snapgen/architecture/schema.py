"""Description of a U-Net in the family of architectures that SnapGen and SnapFusion belong to.

A U-Net has several *levels*; the resolution halves from each to the next. Level ``i`` has a way down, ``down[i]``, and
a way up, ``up[i]``; ``mid`` runs at the lowest. Both begin with the highest resolution: ``levels[i]`` names both ways.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from snapgen import config
from snapgen.architecture.latent_size import LatentSize, latent_sides
from snapgen.config import Config, rule
from snapgen.errors import InputError

ID_DIGITS = 12
MAX_BLOCKS = 64
"""Largest number of blocks of one kind in a level on one way."""
MAX_ALL_BLOCKS = 256
"""Largest number of residual and transformer blocks of a net; SDXL has 87."""
MAX_WIDTH = 16384
"""Largest number of channels."""

BlockKind = Literal["residual", "transformer"]
"""Kind of a block: a residual block, or a transformer with all of its transformer blocks."""

BlockCount = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]


def _are_pairs(layers: object) -> TypeGuard[Sequence[Sequence[int]]]:
    """Whether ``layers`` is a sequence of pairs of integers; further checks are left to the field's validation."""
    if not isinstance(layers, list | tuple):
        return False
    return all(isinstance(x, list | tuple) and len(x) == 2 and all(isinstance(n, int) for n in x) for x in layers)


class BlocksConfig(Config):
    """The blocks of a level on one way, or of the middle.

    A *transformer* consists of norm, projection, ``transformer_depth`` transformer blocks, projection and residual add
    (diffusers' ``Transformer2DModel``). Transformers are spread evenly over the residual blocks; a remainder goes to
    the last ones. A level without residual blocks consists of transformers only.
    """

    num_res_blocks: int = Field(default=2, ge=0, le=MAX_BLOCKS)
    """Residual blocks."""
    num_transformers: int = Field(default=0, ge=0, le=MAX_BLOCKS)
    """Transformers, spread evenly over the residual blocks; a remainder goes to the last ones. Without residual blocks
    the level consists of transformers only."""
    layers: tuple[tuple[BlockCount, BlockCount], ...] | None = Field(default=None, min_length=1, max_length=MAX_BLOCKS)
    """Residual blocks and transformers of each layer, where they are not spread evenly; the two counts are then their
    sums. A layer without a block keeps its skip and, where the width changes, its 1×1 convolution."""
    transformer_depth: int = Field(default=1, ge=0, le=64)
    """Transformer blocks in each transformer."""
    self_attention: bool = True
    """Whether transformer blocks have self-attention."""
    cross_attention: bool = True
    """Whether transformer blocks have cross-attention to the context."""
    num_kv_heads: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Key/value heads: 1 is MQA, a divisor of the heads is GQA, None is one per query head (MHSA)."""
    head_dim: int = Field(default=64, ge=4, le=MAX_WIDTH)
    """Channels of an attention head."""
    ffn_ratio: float = Field(default=4, gt=0, le=16)
    """Inner width of the GEGLU feed-forward layer over the level's channels."""
    conv: Literal["standard", "separable"] = "standard"
    """Convolutions of the residual blocks: standard 3×3, or separable (depthwise and pointwise)."""
    expansion: float = Field(default=1, ge=1, le=8)
    """Width between the two separable convolutions of a residual block over max(in, out); 1: no expansion."""

    @model_validator(mode="before")
    @classmethod
    def _count_layers(cls, data: object) -> object:
        layers = data.get("layers") if isinstance(data, dict) else None
        if not _are_pairs(layers):
            return data
        residuals, transformers = (sum(layer[i] for layer in layers) for i in (0, 1))
        return {**data, "num_res_blocks": residuals, "num_transformers": transformers}  # type: ignore[dict-item]

    @model_serializer(mode="wrap")
    def _leave_out_absent_layers(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if values.get("layers") is None:
            values.pop("layers", None)
        return values

    @property
    def num_residual_slots(self) -> int:
        """Number of layers that can hold residual blocks; 0 in a level that consists of transformers only."""
        return len(self.layers) if self.layers is not None else self.num_res_blocks

    def layer_counts(self, *, is_mid: bool = False) -> tuple[tuple[int, int], ...]:
        """Numbers of residual blocks and of transformers in each layer.

        Args:
            is_mid: whether these are the blocks of the middle, where no transformer follows the last of several
                residual blocks.
        """
        transformers = self.num_transformers if self.has_transformers else 0
        if self.layers is not None:
            return tuple((residuals, count if transformers else 0) for residuals, count in self.layers)
        if not self.num_res_blocks:
            return ((0, 1),) * transformers
        count = self.num_res_blocks
        # The first n layers share the transformers evenly; integer division gives a remainder to the last of them.
        n = count - 1 if is_mid and count > 1 else count
        shares = [(i + 1) * transformers // n - i * transformers // n for i in range(n)]
        return tuple((1, share) for share in [*shares, *[0] * (count - n)])

    def hidden_channels(self, in_channels: int, out_channels: int) -> int:
        """Width between the two convolutions of a residual block.

        Raises:
            ValueError: if the expanded width is not a whole number.
        """
        if self.conv == "standard" or self.expansion == 1:
            return out_channels
        return _scaled_width(self.expansion, max(in_channels, out_channels), "expansion")

    def ffn_dim(self, channels: int) -> int:
        """Inner width of the feed-forward layers.

        Raises:
            ValueError: if the width is not a whole number.
        """
        return _scaled_width(self.ffn_ratio, channels, "ffn_ratio")

    @property
    def has_attention(self) -> bool:
        """Whether the net built from this has any attention here."""
        return self.has_transformers and (self.self_attention or self.cross_attention)

    @property
    def has_transformers(self) -> bool:
        """Whether the net built from this has any transformer block here."""
        return self.num_transformers > 0 and self.transformer_depth > 0

    def canonical(self, channels: int, *, resamples: bool, is_mid: bool = False, takes_skips: bool = False) -> Self:
        """The same blocks with every field that has no effect set to its default.

        Args:
            channels: width of the level.
            resamples: whether the level has a downsampling or upsampling convolution on this way.
            is_mid: as in `layer_counts`.
            takes_skips: whether the layers take skips, so that even a layer without blocks has an effect.
        """
        changes: dict[str, Any] = {}
        if self.layers is not None:
            layers = self.layer_counts(is_mid=is_mid)
            even_spread = self.model_copy(update={"layers": None}).layer_counts(is_mid=is_mid)
            redundant = layers == even_spread and (self.num_res_blocks > 0 or not takes_skips)
            changes["layers"] = None if redundant else layers
        if not self.has_transformers:
            changes |= _defaults(
                "num_transformers", "transformer_depth", "self_attention", "cross_attention", "ffn_ratio"
            )
        if not self.has_attention:
            changes |= _defaults("num_kv_heads", "head_dim")
        elif self.num_kv_heads == channels // self.head_dim:
            changes |= _defaults("num_kv_heads")
        if self.num_res_blocks == 0 and not resamples:
            changes |= _defaults("conv")
        if self.num_res_blocks == 0 or self.conv == "standard":
            changes |= _defaults("expansion")
        for ratio in {"ffn_ratio", "expansion"} - changes.keys():
            changes[ratio] = float(_as_fraction(getattr(self, ratio)))
        return self.model_copy(update=changes)


class LevelConfig(BlocksConfig):
    """The blocks of one level on the way down or on the way up, and their width."""

    channels: int = Field(ge=1, le=MAX_WIDTH)
    """Channels of the level on this way."""


class TimeEmbeddingConfig(Config):
    """Timestep embedding: sinusoidal features, an MLP, and a projection in every residual block."""

    embed_dim: int = Field(default=256, ge=2, le=MAX_WIDTH, multiple_of=2)
    """Sinusoidal features of the timestep."""
    hidden_dim: int = Field(default=896, ge=1, le=4 * MAX_WIDTH)
    """Width of the MLP behind them."""
    projection: Literal["expanded", "output"] = "expanded"
    """Position at which a residual block adds the projected embedding: between its convolutions at the expanded width,
    or after them at the output's width."""


class Architecture(Config):
    """Complete description of a U-Net: everything needed to build it, nothing about its training."""

    latent_channels: int = Field(default=16, ge=1, le=MAX_WIDTH)
    """Channels of the latent; given by the autoencoder."""
    context_dim: int = Field(default=768, ge=1, le=4 * MAX_WIDTH)
    """Channels of the context; given by the text encoders."""
    norm_groups: int = Field(default=32, ge=1, le=MAX_WIDTH)
    """Groups of every GroupNorm."""
    qk_norm: bool = False
    """RMSNorm on queries and keys."""
    rope: bool = False
    """2-D rotary position embedding in self-attention."""
    time: TimeEmbeddingConfig = TimeEmbeddingConfig()
    """The timestep's embedding."""
    down: tuple[LevelConfig, ...] = Field(min_length=1, max_length=12)
    """Levels on the way down, highest resolution first."""
    mid: BlocksConfig = BlocksConfig()
    """Blocks at the lowest resolution."""
    up: tuple[LevelConfig, ...] = Field(min_length=1, max_length=12)
    """Levels on the way up, in order of resolution: highest first, as in `down`."""

    @rule
    def _fits_together(self) -> None:
        if len(self.up) != len(self.down):
            raise ValueError(f"down has {len(self.down)} levels, up {len(self.up)}; give both the same number")
        count = sum(b.num_res_blocks + b.num_transformers * b.transformer_depth for _, b, _ in self.named_levels())
        if count > MAX_ALL_BLOCKS:
            raise ValueError(f"it has {count:,} residual and transformer blocks; use {MAX_ALL_BLOCKS} or fewer")
        for name, blocks, channels in self.named_levels():
            self._check(name, blocks, channels)
        for level, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            if up.num_residual_slots == 0:
                raise ValueError(f"up[{level}] has no residual block to take the skips; give it at least one")
            self._check_expansion(f"down[{level}]", down, down.channels, self.down_in_channels(level))
            self._check_expansion(f"up[{level}]", up, up.channels, self.up_in_channels(level))
        self._check_expansion("mid", self.mid, self.down[-1].channels, [self.down[-1].channels])

    def _check(self, name: str, blocks: BlocksConfig, channels: int) -> None:
        if channels % self.norm_groups:
            raise ValueError(
                f"{name} has {channels} channels, not a multiple of norm_groups; use multiples of {self.norm_groups}"
            )
        if isinstance(blocks, LevelConfig) and blocks.num_residual_slots == 0 and not blocks.has_transformers:
            raise ValueError(f"{name} has no blocks; give it a residual block or a transformer")
        if blocks.has_transformers:
            blocks.ffn_dim(channels)
        if blocks.has_attention:
            self._check_heads(name, blocks, channels)

    def _check_expansion(self, name: str, blocks: BlocksConfig, channels: int, all_in_channels: list[int]) -> None:
        for in_channels in all_in_channels:
            widest, expanded = max(in_channels, channels), blocks.hidden_channels(in_channels, channels)
            if expanded % self.norm_groups:
                raise ValueError(
                    f"{name} expands {widest} channels to {expanded}, not a multiple of norm_groups; "
                    f"use multiples of {self.norm_groups}"
                )

    def _check_heads(self, name: str, blocks: BlocksConfig, channels: int) -> None:
        heads, remainder = divmod(channels, blocks.head_dim)
        if remainder or not heads:
            raise ValueError(
                f"{name} has {channels} channels, not a multiple of its head_dim {blocks.head_dim}; "
                "change one of the two"
            )
        if blocks.num_kv_heads is not None and heads % blocks.num_kv_heads:
            raise ValueError(
                f"{name} has {heads} heads, which {blocks.num_kv_heads} num_kv_heads do not divide; "
                f"use a divisor of {heads}, or null for one per query head"
            )
        if self.rope and blocks.self_attention and blocks.head_dim % 4:
            raise ValueError(
                f"{name} has head_dim {blocks.head_dim}, but 2-D RoPE halves it twice; use a multiple of 4"
            )

    def named_levels(self) -> tuple[tuple[str, BlocksConfig, int], ...]:
        """Path, blocks and channels of ``down[i]``, ``mid`` and ``up[i]``, in the order of the forward pass."""
        return (
            *((f"down[{i}]", down, down.channels) for i, down in enumerate(self.down)),
            ("mid", self.mid, self.down[-1].channels),
            *((f"up[{i}]", self.up[i], self.up[i].channels) for i in reversed(range(len(self.up)))),
        )

    def skip_channels(self, level: int) -> list[int]:
        """Widths of a level's skips, oldest first: its input, then the output of every layer on the way down."""
        down = self.down[level]
        layers = down.num_residual_slots or down.num_transformers
        return [self.down[max(level - 1, 0)].channels, *[down.channels] * layers]

    def down_in_channels(self, level: int) -> list[int]:
        """Input width of each layer of ``down[level]`` that can hold residual blocks."""
        down = self.down[level]
        return [self.skip_channels(level)[0], *[down.channels] * down.num_residual_slots][: down.num_residual_slots]

    def up_in_channels(self, level: int) -> list[int]:
        """Input width of each layer of ``up[level]`` that can hold residual blocks, with its skip concatenated.

        Layers take the skips newest first, while there are any.
        """
        up = self.up[level]
        below = self.down[-1].channels if level == len(self.up) - 1 else self.up[level + 1].channels
        widths = [below, *[up.channels] * (up.num_residual_slots - 1)]
        skips = [*reversed(self.skip_channels(level)), *[0] * len(widths)]  # layers beyond the skips take none
        return [width + skip for width, skip in zip(widths, skips, strict=False)]

    @property
    def has_cross_attention(self) -> bool:
        """Whether the net needs a context."""
        return any(blocks.has_attention and blocks.cross_attention for _, blocks, _ in self.named_levels())

    @property
    def stride(self) -> int:
        """Number of which the latent's height and width must be multiples."""
        return int(2 ** (len(self.down) - 1))

    def validate_latent_size(self, size: LatentSize, *, source: str | Path = "latent", place: str = "") -> None:
        """Raise if the net cannot process a latent of this height and width.

        Args:
            size: height and width.
            source: file or option that the size comes from, for the error message.
            place: location within the source.

        Raises:
            InputError: if the size is not a multiple of `stride`.
        """
        for side in latent_sides(size):
            if side < 1 or side % self.stride:
                problem = f"size {side} cannot be halved {len(self.down) - 1} times"
                raise InputError(source, problem, f"use a multiple of {self.stride}", place=place)

    def canonical(self) -> Architecture:
        """Description of the same net with every field that has no effect set to its default."""
        last = len(self.down) - 1
        down = tuple(s.canonical(s.channels, resamples=i < last) for i, s in enumerate(self.down))
        up = tuple(s.canonical(s.channels, resamples=i > 0, takes_skips=True) for i, s in enumerate(self.up))
        mid = self.mid.canonical(self.down[-1].channels, resamples=False, is_mid=True)
        blocks = (*down, mid, *up)
        changes: dict[str, Any] = {"down": down, "mid": mid, "up": up}
        if not any(b.has_attention for b in blocks):
            changes["qk_norm"] = False
        if not any(b.has_attention and b.self_attention for b in blocks):
            changes["rope"] = False
        if not self.has_cross_attention:
            changes["context_dim"] = Architecture.model_fields["context_dim"].default
        return self.model_copy(update=changes)

    @property
    def id(self) -> str:
        """Hash of the canonical form: two descriptions have equal ids exactly if they build the same net."""
        values = _with_original_names(self.canonical().model_dump(mode="json"))
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]

    def to_json(self) -> str:
        """JSON text that `Architecture.load` reads back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Read an architecture from a JSON or YAML file.

        Raises:
            InputError: if the file cannot be read or does not describe an architecture.
        """
        return config.load_yaml(path, cls)


def _defaults(*names: str) -> dict[str, Any]:
    return {name: BlocksConfig.model_fields[name].default for name in names}


_ORIGINAL_NAMES = {
    "num_res_blocks": "residual_blocks",
    "num_transformers": "transformers",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_width",
    "context_dim": "context_width",
    "embed_dim": "frequencies",
    "hidden_dim": "width",
    "standard": "plain",
}
"""Names of fields and values when ids were first published; ids are computed from them and so stay the same."""


def _with_original_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {_ORIGINAL_NAMES.get(key, key): _with_original_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_original_names(item) for item in value]
    return _ORIGINAL_NAMES.get(value, value) if isinstance(value, str) else value


def _as_fraction(ratio: float) -> Fraction:
    """The ratio that was written in decimals: 21/10 for 2.1, not the nearest float."""
    return Fraction(ratio).limit_denominator(1000)


def _scaled_width(ratio: float, width: int, name: str) -> int:
    product = _as_fraction(ratio) * width
    if product.denominator != 1:
        raise ValueError(f"{name} {ratio:g} of {width} channels is not a whole number; change one of the two")
    return int(product)
