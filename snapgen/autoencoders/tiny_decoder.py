"""SnapGen's tiny decoder: latents to pixels by thin separable convolutions, without attention (SnapGen, section 3.2).

Widths and block counts are not published; they are configuration, so that the paper-size decoder (`PAPER`) and the
narrow one of the shipped autoencoder are the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

PAPER: dict[str, Any] = {"latent_channels": 16, "widths": (64, 128, 256, 256), "blocks": (3, 3, 3, 3), "mid_blocks": 2}
"""A configuration with the published 1.38 M parameters for SD3's 16 latent channels; the widths are our choice."""


class SeparableConv(nn.Sequential):
    """Depthwise 3×3, then pointwise to ``wide`` channels, with nothing between them.

    The depthwise one has no bias: the pointwise one's does its work.
    """

    def __init__(self, channels: int, wide: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, wide, 1),
        )


class SeparableResBlock(nn.Module):
    """x + [DW3×3 → PW(C→m)] → [DW3×3 → GroupNorm → SiLU → PW(m→C)], m = ``expansion``·C: one GroupNorm a block.

    (B, C, H, W) in and out; the width never changes here, so there is no shortcut convolution.
    """

    def __init__(self, channels: int, *, expansion: float, norm_groups: int) -> None:
        super().__init__()
        wide = round(channels * expansion)
        self.widen = SeparableConv(channels, wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm = nn.GroupNorm(norm_groups, wide)
        self.narrow = nn.Conv2d(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(self.widen(x)))
        return x + cast(Tensor, self.narrow(functional.silu(hidden)))


class Upsample(nn.Module):
    """Nearest ×2, then a separable convolution to the next width: (B, C, H, W) → (B, wide, 2H, 2W)."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.conv = SeparableConv(channels, wide)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest")))


class TinyDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Latents (B, latent_channels, h, w) to images (B, 3, h·factor, w·factor), about [-1, 1]; any size.

    Blocks run at a level's width; the width changes in the upsampling that follows it. The highest level has none, so
    the factor is 2^(levels − 1).

    Args:
        latent_channels: channels of the latents.
        widths: channels of each level, highest resolution first.
        blocks: residual blocks of each level, in the same order.
        mid_blocks: residual blocks before the first level, at the lowest resolution.
        expansion: intermediate width of a block over its width.
        norm_groups: groups of each GroupNorm; must divide every width and intermediate width.

    Raises:
        ValueError: if the configuration describes no decoder.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        latent_channels: int = 16,
        widths: Sequence[int] = (64, 128, 256, 256),
        blocks: Sequence[int] = (3, 3, 3, 3),
        mid_blocks: int = 2,
        expansion: float = 1,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        check_levels(widths, blocks, expansion=expansion, norm_groups=norm_groups)

        def thin(width: int, count: int) -> list[nn.Module]:
            return [SeparableResBlock(width, expansion=expansion, norm_groups=norm_groups) for _ in range(count)]

        low_to_high = list(zip(widths, blocks, strict=True))[::-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1), *thin(widths[-1], mid_blocks)]
        for level, (width, count) in enumerate(low_to_high):
            layers += thin(width, count)
            if level + 1 < len(low_to_high):
                layers.append(Upsample(width, low_to_high[level + 1][0]))
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @property
    def factor(self) -> int:
        """Pixels along a side of the image for one of the latent."""
        return cast(int, 2 ** (len(self.config.widths) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.norm_out(self.layers(latents))
        return cast(Tensor, self.conv_out(functional.silu(hidden)))


def check_levels(widths: Sequence[int], blocks: Sequence[int], *, expansion: float, norm_groups: int) -> None:
    """Whether levels can be built so.

    Raises:
        ValueError: naming what does not fit and what would.
    """
    if not widths or len(widths) != len(blocks):
        raise ValueError(f"{len(widths)} widths, {len(blocks)} block counts; give one of each a level")
    for width in widths:
        if width < 1 or width % norm_groups or round(width * expansion) % norm_groups:
            raise ValueError(
                f"width {width} × {expansion:g} is no multiple of norm_groups; use multiples of {norm_groups}"
            )
