"""What the configuration of a diffusers U-Net describes, in our words, and where the two families part.

Read are `UNet2DConditionModel` (SD-1.5, SD-2.1, SDXL) and `DreamLiteUNetModel`. Two quirks of the latter are not in the
paper (arXiv 2412.09619) and not in our family: blocks without self-attention replace their tokens by their norm, where
ours leave them as they are; and separable convolutions widen to twice the *output's* width and leave the samplers
plain, where ours widen to twice the larger of input and output and separate the samplers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snapgen import config as settings
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time", "time"),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "qk_norm": (None, "rms_norm"),
}
"""Fields in which our family has no choice, and the values that mean what it does."""

SELF_ATTENTION: dict[str, bool | None] = {
    "DownBlock2D": None,
    "UpBlock2D": None,
    "UNetMidBlock2D": None,
    "CrossAttnDownBlock2D": True,
    "CrossAttnUpBlock2D": True,
    "UNetMidBlock2DCrossAttn": True,
    "CrossAttnNoSelfAttnDownBlock2D": False,
    "CrossAttnNoSelfAttnUpBlock2D": False,
    "CrossAttnDownRemoveSelfAttnBlock2D": False,
    "CrossAttnUpRemoveSelfAttnBlock2D": False,
    "CrossAttnUpRemoveSelfAttnBlock2DV1": False,
}
"""Kinds of blocks, ``DreamLite`` taken off their names: whether they have self-attention; None: no transformers."""


@dataclass(frozen=True)
class ConfigMismatch:
    """A field of their configuration that our family cannot follow."""

    field: str
    problem: str


@dataclass(frozen=True)
class ConfigMatch:
    """The nearest architecture of our family, and all in which the net differs from it."""

    architecture: Architecture
    differences: tuple[ConfigMismatch, ...]


def describe(config: Mapping[str, Any], source: str) -> ConfigMatch:
    """The architecture that a complete configuration of a diffusers U-Net describes.

    Args:
        config: every field, the defaults filled in.
        source: what to call it in an error.

    Raises:
        InputError: if it describes none of our family, naming the field.
    """
    reader = _Reader(config, source)
    values = reader.architecture()
    return ConfigMatch(settings.parse_config(values, Architecture, source=source), tuple(reader.differences))


class _Reader:
    """One configuration being read; differences are collected on the way."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source
        self.channels: Sequence[int] = config["block_out_channels"]
        self.differences: list[ConfigMismatch] = []

    def architecture(self) -> dict[str, Any]:
        """As values for `Architecture`."""
        for field, allowed in ONE_VALUE.items():
            value = self.config.get(field, allowed[0])
            if not all(v in allowed for v in (value if isinstance(value, list | tuple) else [value])):
                self.differ(field, f"is {value!r}, where our U-Net has {' or '.join(map(repr, allowed))}")
        if self.config["in_channels"] != self.config["out_channels"]:
            self.refuse("in_channels", f"is not out_channels ({self.config['out_channels']})")
        if self.config["norm_num_groups"] is None:
            self.refuse("norm_num_groups", "is null: a net without norms")
        if self.config.get("use_sep_conv"):
            problem = "widens to twice the output's width and keeps its samplers plain, as our separable stages do not"
            self.differ("use_sep_conv", problem)
        levels = range(len(self.channels))
        depths_up = self.config["reverse_transformer_layers_per_block"]
        return {
            "latent_channels": self.config["in_channels"],
            "context_width": self.context_width(),
            "norm_groups": self.config["norm_num_groups"],
            "qk_norm": bool(self.config.get("qk_norm")),
            "time": {
                "frequencies": self.channels[0],
                "width": self.config["time_embedding_dim"] or 4 * self.channels[0],
            },
            "down": [self.stage("down_block_types", i, i) for i in levels],
            "mid": self.mid(),
            "up": [
                self.stage("up_block_types", len(levels) - 1 - i, i, more=1, depths=depths_up and depths_up[::-1])
                for i in levels
            ],
        }

    def stage(
        self, field: str, place: int, level: int, *, more: int = 0, depths: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """A level's blocks: ``place`` in their list of types, ``more`` residual blocks than on the way down."""
        count = self.each("layers_per_block", level) + more
        blocks = self.blocks(self.config[field][place], f"{field}[{place}]", level, count, depths)
        return {"channels": self.channels[level], "residual_blocks": count, **blocks}

    def mid(self) -> dict[str, Any]:
        """The middle: a transformer between each two residual blocks."""
        kind = self.config["mid_block_type"]
        if kind is None:
            return {"residual_blocks": 0}
        blocks = self.blocks(kind, "mid_block_type", len(self.channels) - 1, self.config.get("num_mid_layers", 1))
        return {"residual_blocks": blocks.get("transformers", 0) + 1, **blocks}

    def blocks(
        self, kind: str, place: str, level: int, transformers: int, depths: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """What a stage and the middle have in common."""
        name = kind.removeprefix("DreamLite")
        if name not in SELF_ATTENTION:
            self.refuse(place, f"is {kind}, which our family does not have")
        self_attention = SELF_ATTENTION[name]
        conv = {"conv": "separable", "expansion": 2} if self.config.get("use_sep_conv") else {}
        if self_attention is None:
            return conv
        if not self_attention:
            self.differ(place, "has blocks that replace their tokens by their norm, where ours leave them as they are")
        return {
            **conv,
            "transformers": transformers,
            "transformer_depth": self.depth(level, depths),
            "self_attention": self_attention,
            "head_width": self.head_width(level),
            "kv_heads": self.config.get("num_kv_heads"),
            "ffn_ratio": self.config.get("ff_mult", 4),
        }

    def context_width(self) -> int:
        """The one width of all contexts."""
        widths = {self.each("cross_attention_dim", i) for i in range(len(self.channels))}
        if len(widths) > 1:
            self.refuse("cross_attention_dim", f"has several widths: {sorted(widths)}")
        return int(widths.pop())

    def depth(self, level: int, depths: Sequence[Any] | None) -> int:
        """Transformer blocks of each of a level's transformers."""
        field = "reverse_transformer_layers_per_block" if depths else "transformer_layers_per_block"
        value = depths[level] if depths else self.each(field, level)
        found = set(value) if isinstance(value, list | tuple) else {value}
        if len(found) > 1:
            self.refuse(f"{field}[{level}]", f"is {list(value)}: transformers of several depths in a stage")
        return int(found.pop())

    def head_width(self, level: int) -> int:
        """Their ``attention_head_dim`` is the number of heads."""
        heads = self.each("attention_head_dim", level)
        if self.channels[level] % heads:
            self.refuse("attention_head_dim", f"has {heads} heads, which do not divide {self.channels[level]} channels")
        return int(self.channels[level] // heads)

    def each(self, field: str, level: int) -> Any:
        """A level's value of a field that can hold one for all."""
        value = self.config[field]
        return value[level] if isinstance(value, list | tuple) else value

    def differ(self, field: str, problem: str) -> None:
        """Note a difference."""
        self.differences.append(ConfigMismatch(field, problem))

    def refuse(self, field: str, problem: str) -> None:
        """Give up: no architecture of ours is near."""
        raise InputError(self.source, problem, "convert a U-Net of another kind", place=field)
