"""SnapGen's tiny decoder from latents to pixels: thin separable convolutions, no attention (SnapGen, section 3.2).

Widths and block counts are not published. They are configurable here, so that the decoder of the paper's size (`PAPER`)
and the narrow one of the shipped autoencoder share their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

PAPER: dict[str, Any] = {"latent_channels": 16, "widths": (64, 128, 256, 256), "blocks": (3, 3, 3, 3), "mid_blocks": 2}
"""A configuration with the published 1.38 M parameters, for SD3's 16 latent channels; the widths are our choice."""


class SeparableConv(nn.Sequential):
    """Depthwise 3×3, then pointwise convolution, without norm or activation between them.

    (B, in_channels, H, W) → (B, out_channels, H/stride, W/stride). The depthwise convolution has no bias, which the
    pointwise one's makes redundant.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, out_channels, 1),
        )


class SeparableResBlock(nn.Module):
    """Residual block x + [DW3×3 → PW(C→m)] → [DW3×3 → GroupNorm → SiLU → PW(m→C)] with m = ``expansion``·C.

    (B, C, H, W) → (B, C, H, W). Widths change only in the upsampling layers, so there is no shortcut convolution.
    """

    def __init__(self, channels: int, *, expansion: float, norm_groups: int) -> None:
        super().__init__()
        hidden_channels = round(channels * expansion)
        self.widen = SeparableConv(channels, hidden_channels)
        self.depthwise = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, groups=hidden_channels, bias=False)
        self.norm = nn.GroupNorm(norm_groups, hidden_channels)
        self.narrow = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(self.widen(x)))
        return x + cast(Tensor, self.narrow(functional.silu(hidden)))


class Upsample(nn.Module):
    """Nearest ×2, then a separable convolution: (B, in_channels, H, W) → (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = SeparableConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest")))


class TinyDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Decodes latents (B, latent_channels, h, w) of any size to images (B, 3, h·factor, w·factor) of about [-1, 1].

    Blocks have their level's width, and the upsampling after a level changes to the next width. The highest level has
    no upsampling, so the factor is 2^(levels − 1).

    Args:
        latent_channels: channels of the latents.
        widths: channels of each level, highest resolution first.
        blocks: residual blocks of each level, in the same order.
        mid_blocks: residual blocks before the first level, at the lowest resolution.
        expansion: hidden width of a block relative to its width.
        norm_groups: groups of each GroupNorm; must divide every width and hidden width.

    Raises:
        ValueError: if the configuration is invalid.
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

        def res_blocks(width: int, count: int) -> list[nn.Module]:
            return [SeparableResBlock(width, expansion=expansion, norm_groups=norm_groups) for _ in range(count)]

        low_to_high = list(zip(widths, blocks, strict=True))[::-1]
        conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        layers: list[nn.Module] = [conv_in, *res_blocks(widths[-1], mid_blocks)]
        for level, (width, count) in enumerate(low_to_high):
            layers += res_blocks(width, count)
            if level + 1 < len(low_to_high):
                layers.append(Upsample(width, low_to_high[level + 1][0]))
        self.layers = nn.Sequential(*layers)
        self.norm_out = nn.GroupNorm(norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    @property
    def factor(self) -> int:
        """Downscale factor: pixels along a side of the image per position of the latent."""
        return cast(int, 2 ** (len(self.config.widths) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.norm_out(self.layers(latents))
        return cast(Tensor, self.conv_out(functional.silu(hidden)))


def check_levels(widths: Sequence[int], blocks: Sequence[int], *, expansion: float, norm_groups: int) -> None:
    """Check that the levels of an encoder or decoder can be built.

    Raises:
        ValueError: if they cannot; the message names the value and the remedy.
    """
    if not widths or len(widths) != len(blocks):
        raise ValueError(f"{len(widths)} widths, {len(blocks)} block counts; give one of each per level")
    for width in widths:
        if width < 1 or width % norm_groups or round(width * expansion) % norm_groups:
            raise ValueError(
                f"width {width} × {expansion:g} is not a multiple of norm_groups; use multiples of {norm_groups}"
            )
