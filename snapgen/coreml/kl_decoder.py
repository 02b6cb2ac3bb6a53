"""The decoder of a diffusers AutoencoderKL for Core ML, without divisions by 1, on which coremltools fails."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention as Source
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from snapgen.autoencoders.latent_scale import latent_scale
from snapgen.coreml.layers import pointwise, substitute


class KLDecoder(nn.Module):
    """Decodes latents of `snapgen.autoencoders.autoencoder.KLAutoencoder`: (1, C, h, w) → (1, 3, h·factor, w·factor).

    The autoencoder is modified: its layers are replaced.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        channels = vae.config.latent_channels
        self.unscale = nn.Conv2d(channels, channels, 1, groups=channels)
        scale = latent_scale(vae)
        self.unscale.weight.data = (1 / scale.factor)[:, None].float()  # (C, 1, 1, 1)
        cast(Tensor, self.unscale.bias).data = scale.mean.flatten().float()
        self.unscale.to(vae.dtype)
        self.before = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder
        _replace(self.decoder)
        substitute(self)

    def forward(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.before(self.unscale(latents))))


class ResnetBlock(nn.Module):
    """A ResnetBlock2D without a timestep."""

    def __init__(self, source: ResnetBlock2D) -> None:
        super().__init__()
        assert source.output_scale_factor == 1, source.output_scale_factor
        assert source.upsample is source.downsample is None
        self.norm1, self.conv1 = source.norm1, source.conv1
        self.norm2, self.conv2 = source.norm2, source.conv2
        self.shortcut = source.conv_shortcut or nn.Identity()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return cast(Tensor, self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden))))


class Attention(nn.Module):
    """Self-attention over all positions, with its norm and its residual connection."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.heads = source.heads
        self.norm = source.group_norm
        self.q, self.k, self.v, self.out = (
            pointwise(layer.weight, layer.bias) for layer in (source.to_q, source.to_k, source.to_v, source.to_out[0])
        )

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        hidden = self.norm(x)
        # (B, C, H, W) -> (B, heads, D, H, W) -> (B, heads, D, HW) -> (B, heads, HW, D)
        q, k, v = (
            layer(hidden).unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)  # -> (B, heads, D, HW)
        return cast(Tensor, x + self.out(attended.reshape(x.shape)))


def _replace(root: nn.Module) -> None:
    for name, module in list(root.named_children()):
        if isinstance(module, ResnetBlock2D):
            setattr(root, name, ResnetBlock(module))
        elif isinstance(module, Source):
            setattr(root, name, Attention(module))
        else:
            _replace(module)
