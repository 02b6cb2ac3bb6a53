"""The one description of a U-Net: what varies, in the family that SnapGen and SnapFusion draw from.

A net is a number of *levels* of halving resolution. Level ``i`` has a stage on the way down, ``down[i]``, and one on
the way up, ``up[i]``, at the same resolution; ``mid`` runs at the lowest. ``up`` is in order of resolution, highest
first, as ``down`` is, so that ``stages[i]`` of a path names both.
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
from snapgen.config import Config
from snapgen.errors import InputError

ID_DIGITS = 12
MOST = 64
"""Blocks of a kind in a stage."""

BlockKind = Literal["residual", "transformer"]
"""What a block is."""

Count = Annotated[int, Field(ge=0, le=MOST)]


def _are_pairs(layers: object) -> TypeGuard[Sequence[Sequence[int]]]:
    """Whether they can be counted; what else may be wrong with them, their field's check says."""
    if not isinstance(layers, list | tuple):
        return False
    return all(isinstance(x, list | tuple) and len(x) == 2 and all(isinstance(n, int) for n in x) for x in layers)


class BlocksConfig(Config):
    """The blocks of a stage or of the middle.

    A *transformer* is norm, projection, ``transformer_depth`` transformer blocks, projection, residual add (diffusers'
    ``Transformer2DModel``). Residual blocks and transformers are counted apart: transformers are dealt evenly after
    the residual blocks, later ones first; without residual blocks a stage is its transformers alone.
    """

    residual_blocks: int = Field(default=2, ge=0, le=MOST)
    transformers: int = Field(default=0, ge=0, le=MOST)
    layers: tuple[tuple[Count, Count], ...] | None = Field(default=None, min_length=1, max_length=MOST)
    """Residual blocks and transformers of each layer, where they are not dealt as said above; the two counts are then
    their sums, whatever is given for them. Even without a block a layer keeps its skip, and the 1×1 convolution that
    its width may need: so any block of a net can be left out and the others stay what they are."""
    transformer_depth: int = Field(default=1, ge=0, le=64)
    self_attention: bool = True
    cross_attention: bool = True
    kv_heads: int | None = Field(default=None, ge=1)
    """Key/value heads: 1 is MQA, a divisor of the heads GQA, None (one a query head) MHSA."""
    head_width: int = Field(default=64, ge=4)
    ffn_ratio: float = Field(default=4, gt=0, le=16)
    """Width of the GEGLU feed-forward layer over the stage's channels."""
    conv: Literal["plain", "separable"] = "plain"
    expansion: float = Field(default=1, ge=1, le=8)
    """Intermediate width between the two separable convs, over max(in, out); 1: no expansion, the output's width."""

    @model_validator(mode="before")
    @classmethod
    def _count_layers(cls, data: object) -> object:
        layers = data.get("layers") if isinstance(data, dict) else None
        if not _are_pairs(layers):
            return data
        residuals, transformers = (sum(layer[i] for layer in layers) for i in (0, 1))
        return {**data, "residual_blocks": residuals, "transformers": transformers}  # type: ignore[dict-item]

    @model_serializer(mode="wrap")
    def _leave_out_absent_layers(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if values.get("layers") is None:
            values.pop("layers", None)
        return values

    @property
    def places(self) -> int:
        """Layers with a place for residual blocks; none where a stage is its transformers alone."""
        return len(self.layers) if self.layers is not None else self.residual_blocks

    def dealt(self, *, ends_plain: bool = False) -> tuple[tuple[int, int], ...]:
        """Residual blocks and transformers of each layer.

        With ``ends_plain``, the middle's way, no transformer follows the last of several residual blocks.
        """
        transformers = self.transformers if self.has_transformers else 0
        if self.layers is not None:
            return tuple((residuals, count if transformers else 0) for residuals, count in self.layers)
        if not self.residual_blocks:
            return ((0, 1),) * transformers
        count = self.residual_blocks
        takers = count - 1 if ends_plain and count > 1 else count
        shares = [(i + 1) * transformers // takers - i * transformers // takers for i in range(takers)]
        return tuple((1, share) for share in [*shares, *[0] * (count - takers)])

    def expanded(self, inside: int, outside: int) -> int:
        """Width between the two convs of a residual block from ``inside`` to ``outside`` channels.

        Raises:
            ValueError: if it is not a whole number.
        """
        if self.conv == "plain" or self.expansion == 1:
            return outside
        return _whole(self.expansion, max(inside, outside), "expansion")

    def ffn_width(self, channels: int) -> int:
        """Inner width of the feed-forward layers.

        Raises:
            ValueError: if it is not a whole number.
        """
        return _whole(self.ffn_ratio, channels, "ffn_ratio")

    @property
    def attends(self) -> bool:
        """Whether any attention is built."""
        return self.has_transformers and (self.self_attention or self.cross_attention)

    @property
    def has_transformers(self) -> bool:
        """Whether any transformer block is built."""
        return self.transformers > 0 and self.transformer_depth > 0

    def canonical(self, channels: int, *, sampler: bool, ends_plain: bool = False, skips: bool = False) -> Self:
        """These blocks with every knob that changes nothing at its default.

        Args:
            sampler: whether the stage has one.
            ends_plain: as `dealt`.
            skips: whether layers take skips, so that one without a block is not nothing.
        """
        changes: dict[str, Any] = {}
        if self.layers is not None:
            layers = self.dealt(ends_plain=ends_plain)
            as_usual = self.model_copy(update={"layers": None}).dealt(ends_plain=ends_plain)
            usual = layers == as_usual and (self.residual_blocks > 0 or not skips)
            changes["layers"] = None if usual else layers
        if not self.has_transformers:
            changes |= _defaults("transformers", "transformer_depth", "self_attention", "cross_attention", "ffn_ratio")
        if not self.attends:
            changes |= _defaults("kv_heads", "head_width")
        elif self.kv_heads == channels // self.head_width:
            changes |= _defaults("kv_heads")
        if self.residual_blocks == 0 and not sampler:
            changes |= _defaults("conv")
        if self.residual_blocks == 0 or self.conv == "plain":
            changes |= _defaults("expansion")
        for ratio in {"ffn_ratio", "expansion"} - changes.keys():
            changes[ratio] = float(_exact(getattr(self, ratio)))
        return self.model_copy(update=changes)


class LevelConfig(BlocksConfig):
    """One level's blocks on the way down or up, and their width."""

    channels: int = Field(ge=1, le=16384)


class TimeEmbeddingConfig(Config):
    """Sinusoidal features of the timestep, an MLP, and a projection into every residual block."""

    frequencies: int = Field(default=256, ge=2, multiple_of=2)
    width: int = Field(default=896, ge=1)
    projection: Literal["expanded", "output"] = "expanded"
    """Where a residual block adds it: between its convs, at the expanded width, or after them, at the output's."""


class Architecture(Config):
    """A U-Net, whole: everything that is built, nothing that is trained."""

    latent_channels: int = Field(default=16, ge=1)
    context_width: int = Field(default=768, ge=1)
    norm_groups: int = Field(default=32, ge=1)
    qk_norm: bool = False
    rope: bool = False
    time: TimeEmbeddingConfig = TimeEmbeddingConfig()
    down: tuple[LevelConfig, ...] = Field(min_length=1, max_length=12)
    mid: BlocksConfig = BlocksConfig()
    up: tuple[LevelConfig, ...] = Field(min_length=1, max_length=12)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.up) != len(self.down):
            raise ValueError(f"down has {len(self.down)} stages, up {len(self.up)}; give both the same number")
        for place, blocks, channels in self.sites():
            self._check(place, blocks, channels)
        for level, stage in enumerate(self.up):
            if stage.places == 0:
                raise ValueError(f"up[{level}] has no residual block to take the skips; give it at least one")
            self._check_expansion(
                f"down[{level}]", self.down[level], self.down[level].channels, self.down_inputs(level)
            )
            self._check_expansion(f"up[{level}]", stage, stage.channels, self.up_inputs(level))
        self._check_expansion("mid", self.mid, self.down[-1].channels, [self.down[-1].channels])
        return self

    def _check(self, place: str, blocks: BlocksConfig, channels: int) -> None:
        if channels % self.norm_groups:
            raise ValueError(
                f"{place} has {channels} channels, not a multiple of norm_groups; use multiples of {self.norm_groups}"
            )
        if isinstance(blocks, LevelConfig) and blocks.places == 0 and not blocks.has_transformers:
            raise ValueError(f"{place} has no blocks; give it a residual block or a transformer")
        if blocks.has_transformers:
            blocks.ffn_width(channels)
        if blocks.attends:
            self._check_heads(place, blocks, channels)

    def _check_expansion(self, place: str, blocks: BlocksConfig, channels: int, inputs: list[int]) -> None:
        for inside in inputs:
            expanded = blocks.expanded(inside, channels)
            if expanded % self.norm_groups:
                raise ValueError(
                    f"{place} expands {max(inside, channels)} channels to {expanded}, not a multiple of norm_groups; "
                    f"use multiples of {self.norm_groups}"
                )

    def _check_heads(self, place: str, blocks: BlocksConfig, channels: int) -> None:
        heads, rest = divmod(channels, blocks.head_width)
        if rest or not heads:
            raise ValueError(
                f"{place} has {channels} channels, not a multiple of its head_width {blocks.head_width}; "
                "change one of the two"
            )
        if blocks.kv_heads is not None and heads % blocks.kv_heads:
            raise ValueError(
                f"{place} has {heads} heads, which {blocks.kv_heads} kv_heads do not divide; "
                f"use a divisor of {heads}, or null for one each"
            )
        if self.rope and blocks.self_attention and blocks.head_width % 4:
            raise ValueError(
                f"{place} has head_width {blocks.head_width}, but 2-D RoPE halves it twice; use a multiple of 4"
            )

    def sites(self) -> tuple[tuple[str, BlocksConfig, int], ...]:
        """Every place that holds blocks, in the order of the forward pass: its path, its blocks, its channels."""
        return (
            *((f"down[{i}]", stage, stage.channels) for i, stage in enumerate(self.down)),
            ("mid", self.mid, self.down[-1].channels),
            *((f"up[{i}]", self.up[i], self.up[i].channels) for i in reversed(range(len(self.up)))),
        )

    def skips(self, level: int) -> list[int]:
        """Widths of a level's skips, oldest first: its input, then every layer's output on the way down."""
        stage = self.down[level]
        layers = stage.places or stage.transformers
        return [self.down[max(level - 1, 0)].channels, *[stage.channels] * layers]

    def down_inputs(self, level: int) -> list[int]:
        """Input widths of ``down[level]``'s places for residual blocks."""
        stage = self.down[level]
        return [self.skips(level)[0], *[stage.channels] * stage.places][: stage.places]

    def up_inputs(self, level: int) -> list[int]:
        """Likewise of ``up[level]``, skips joined on: newest first, while there are any."""
        stage = self.up[level]
        below = self.down[-1].channels if level == len(self.up) - 1 else self.up[level + 1].channels
        widths = [below, *[stage.channels] * (stage.places - 1)]
        skips = [*reversed(self.skips(level)), *[0] * len(widths)]
        return [width + skip for width, skip in zip(widths, skips, strict=False)]

    @property
    def has_cross_attention(self) -> bool:
        """Whether the net needs a context."""
        return any(blocks.attends and blocks.cross_attention for _, blocks, _ in self.sites())

    @property
    def stride(self) -> int:
        """The latent's height and width must be multiples of this."""
        return int(2 ** (len(self.down) - 1))

    def check_latent(self, size: int, *, source: str | Path = "latent", place: str = "") -> None:
        """Refuse a latent whose height and width the net does not take.

        Args:
            size: height and width.
            source: what holds the size, for the message.
            place: where in the source.

        Raises:
            InputError: naming the source, the place and the remedy.
        """
        if size < 1 or size % self.stride:
            problem = f"size {size} does not halve {len(self.down) - 1} times"
            raise InputError(source, problem, f"use a multiple of {self.stride}", place=place)

    def canonical(self) -> Architecture:
        """The same net, described with every knob that changes nothing at its default."""
        last = len(self.down) - 1
        down = tuple(s.canonical(s.channels, sampler=i < last) for i, s in enumerate(self.down))
        up = tuple(s.canonical(s.channels, sampler=i > 0, skips=True) for i, s in enumerate(self.up))
        mid = self.mid.canonical(self.down[-1].channels, sampler=False, ends_plain=True)
        blocks = (*down, mid, *up)
        changes: dict[str, Any] = {"down": down, "mid": mid, "up": up}
        if not any(b.attends for b in blocks):
            changes["qk_norm"] = False
        if not any(b.attends and b.self_attention for b in blocks):
            changes["rope"] = False
        if not self.has_cross_attention:
            changes["context_width"] = Architecture.model_fields["context_width"].default
        return self.model_copy(update=changes)

    @property
    def id(self) -> str:
        """Hash of the canonical form: equal exactly when two descriptions build the same net."""
        text = json.dumps(self.canonical().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]

    def to_json(self) -> str:
        """As JSON, which `Architecture.load` reads back."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """From a JSON or YAML file.

        Raises:
            InputError: naming the file, the place and the remedy.
        """
        return config.load_yaml(path, cls)


def _defaults(*names: str) -> dict[str, Any]:
    return {name: BlocksConfig.model_fields[name].default for name in names}


def _exact(ratio: float) -> Fraction:
    """A ratio as written: 2.1 is 21/10, not the nearest float."""
    return Fraction(ratio).limit_denominator(1000)


def _whole(ratio: float, width: int, name: str) -> int:
    product = _exact(ratio) * width
    if product.denominator != 1:
        raise ValueError(f"{name} {ratio:g} of {width} channels is no whole number; change one of the two")
    return int(product)
