"""Converts the configuration of a diffusers U-Net to an `Architecture`, and lists what cannot be converted.

Supported are `UNet2DConditionModel` (SD-1.5, SD-2.1, SDXL) and `DreamLiteUNetModel`. Two properties of the latter are
neither in the paper (arXiv 2412.09619) nor in `UNet`. Blocks without self-attention replace their tokens by the norm of
the tokens, where ours leave them unchanged. Separable convolutions expand to twice the *output's* width and do not
apply to down- and upsampling, where ours expand to twice the larger of input and output width and do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snapgen import config as settings
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
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
"""Fields for which `UNet` has a single behavior, and the values that stand for it."""

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
"""Whether a block class, named without ``DreamLite``, has self-attention; None: it has no transformers."""


@dataclass(frozen=True)
class ConfigMismatch:
    """A field of diffusers' configuration that `UNet` does not support."""

    field: str
    problem: str


@dataclass(frozen=True)
class ConfigMatch:
    """The closest architecture, and everything in which the source net differs from it."""

    architecture: Architecture
    differences: tuple[ConfigMismatch, ...]


def describe(config: Mapping[str, Any], source: str) -> ConfigMatch:
    """The architecture of a diffusers U-Net from its complete configuration.

    Args:
        config: all fields, including defaults.
        source: name of the net in error messages.

    Raises:
        InputError: if no architecture is close to it; the message names the field.
    """
    reader = _Reader(config, source)
    values = reader.architecture()
    return ConfigMatch(settings.parse_config(values, Architecture, source=source), tuple(reader.differences))


class _Reader:
    """Reads one configuration and collects the differences."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source
        self.channels: Sequence[int] = config["block_out_channels"]
        self.differences: list[ConfigMismatch] = []

    def architecture(self) -> dict[str, Any]:
        """Fields of `Architecture`."""
        for field, allowed in FIXED_FIELDS.items():
            value = self.config.get(field, allowed[0])
            if not all(v in allowed for v in (value if isinstance(value, list | tuple) else [value])):
                self.differ(field, f"is {value!r}, where our U-Net has {' or '.join(map(repr, allowed))}")
        if self.config["in_channels"] != self.config["out_channels"]:
            self.reject("in_channels", f"is not out_channels ({self.config['out_channels']})")
        if self.config["norm_num_groups"] is None:
            self.reject("norm_num_groups", "is null, which means a net without norms")
        if self.config.get("use_sep_conv"):
            problem = "expands to twice the output's width and not in down- and upsampling, where our U-Net differs"
            self.differ("use_sep_conv", problem)
        levels = range(len(self.channels))
        depths_up = self.config["reverse_transformer_layers_per_block"]
        return {
            "latent_channels": self.config["in_channels"],
            "context_dim": self.context_dim(),
            "norm_groups": self.config["norm_num_groups"],
            "qk_norm": bool(self.config.get("qk_norm")),
            "time": {
                "embed_dim": self.channels[0],
                "hidden_dim": self.config["time_embedding_dim"] or 4 * self.channels[0],
            },
            "down": [self.level("down_block_types", i, i) for i in levels],
            "mid": self.mid(),
            "up": [
                self.level("up_block_types", len(levels) - 1 - i, i, extra=1, depths=depths_up and depths_up[::-1])
                for i in levels
            ],
        }

    def level(
        self, field: str, index: int, level: int, *, extra: int = 0, depths: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Fields of a level at ``index`` of diffusers' block types, with ``extra`` blocks more than on the way down."""
        count = self.value_at("layers_per_block", level) + extra
        blocks = self.blocks(self.config[field][index], f"{field}[{index}]", level, count, depths)
        return {"channels": self.channels[level], "num_res_blocks": count, **blocks}

    def mid(self) -> dict[str, Any]:
        """Fields of the mid stage, which has a transformer between every two residual blocks."""
        kind = self.config["mid_block_type"]
        if kind is None:
            return {"num_res_blocks": 0}
        blocks = self.blocks(kind, "mid_block_type", len(self.channels) - 1, self.config.get("num_mid_layers", 1))
        return {"num_res_blocks": blocks.get("num_transformers", 0) + 1, **blocks}

    def blocks(
        self, kind: str, place: str, level: int, transformers: int, depths: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Fields that levels and the mid stage have in common."""
        name = kind.removeprefix("DreamLite")
        if name not in SELF_ATTENTION:
            self.reject(place, f"is {kind}, which is not supported")
        self_attention = SELF_ATTENTION[name]
        conv = {"conv": "separable", "expansion": 2} if self.config.get("use_sep_conv") else {}
        if self_attention is None:
            return conv
        if not self_attention:
            self.differ(place, "has blocks that replace tokens by their norm, where our U-Net leaves them unchanged")
        return {
            **conv,
            "num_transformers": transformers,
            "transformer_depth": self.depth(level, depths),
            "self_attention": self_attention,
            "head_dim": self.head_dim(level),
            "num_kv_heads": self.config.get("num_kv_heads"),
            "ffn_ratio": self.config.get("ff_mult", 4),
        }

    def context_dim(self) -> int:
        """Width of the context, which must be the same at all levels."""
        widths = {self.value_at("cross_attention_dim", i) for i in range(len(self.channels))}
        if len(widths) > 1:
            self.reject("cross_attention_dim", f"has several widths: {sorted(widths)}")
        return int(widths.pop())

    def depth(self, level: int, depths: Sequence[Any] | None) -> int:
        """Blocks per transformer of a level."""
        field = "reverse_transformer_layers_per_block" if depths else "transformer_layers_per_block"
        value = depths[level] if depths else self.value_at(field, level)
        distinct = set(value) if isinstance(value, list | tuple) else {value}
        if len(distinct) > 1:
            self.reject(f"{field}[{level}]", f"is {list(value)}, transformers of several depths in one level")
        return int(distinct.pop())

    def head_dim(self, level: int) -> int:
        """Channels per head. In these classes ``attention_head_dim`` is the number of heads."""
        heads = self.value_at("attention_head_dim", level)
        if self.channels[level] % heads:
            self.reject("attention_head_dim", f"has {heads} heads, which do not divide {self.channels[level]} channels")
        return int(self.channels[level] // heads)

    def value_at(self, field: str, level: int) -> Any:
        """A level's value of a field that holds either one value for all levels or one per level."""
        value = self.config[field]
        return value[level] if isinstance(value, list | tuple) else value

    def differ(self, field: str, problem: str) -> None:
        """Record a difference."""
        self.differences.append(ConfigMismatch(field, problem))

    def reject(self, field: str, problem: str) -> None:
        """Raise because no architecture is close to the source."""
        raise InputError(self.source, problem, "convert another U-Net", place=field)
