"""Autoencoders: the small one shipped with the package, a diffusers AutoencoderKL from a folder, or the identity.

`load_autoencoder` returns any of them with one interface, `Autoencoder`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from snapgen.autoencoders.latent_scale import latent_scale
from snapgen.autoencoders.pruned_decoder import PrunedAutoencoderKL
from snapgen.autoencoders.tiny_decoder import SeparableConv, SeparableResBlock, TinyDecoder, check_levels
from snapgen.errors import InputError
from snapgen.io import hub, pretrained
from snapgen.io.digests import digest_contents

SHIPPED = {"emoji": Path(__file__).parent / "weights" / "emoji"}
"""Folders of the autoencoders shipped with the package, by name."""
IDENTITY = "none"
"""Name of the identity autoencoder, for training in pixel space."""


class Autoencoder(nn.Module):
    """Interface of all autoencoders: deterministic in both directions, for any image size divisible by ``factor``."""

    factor: int
    """Downscale factor: pixels along a side of the image per position of the latent."""
    latent_channels: int
    """Channels of the latents."""

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, latent_channels, H/factor, W/factor) of unit scale.

        Raises:
            ValueError: if the size is not divisible by ``factor``.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {width}×{height} do not fit; use a resolution divisible by {self.factor}")
        return self._encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, latent_channels, h, w) to images (B, 3, h·factor, w·factor), clamped to [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class Encoder(nn.Module):
    """Mirror image of the tiny decoder: blocks at a level's width, then a stride-2 separable convolution to the next.

    (B, 3, H, W) → (B, latent_channels, H/factor, W/factor). A linear projection of each patch of pixels is added to the
    output, so that training starts from one rather than from noise (the error falls by a quarter within 50 steps). The
    head has no norm, which would remove an image's contrast from its latent. The latents are not normalized here but in
    `ConvAutoencoder`.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        mid_blocks: int,
        expansion: float,
        norm_groups: int,
    ) -> None:
        super().__init__()
        check_levels(widths, blocks, expansion=expansion, norm_groups=norm_groups)

        def res_blocks(width: int, count: int) -> list[nn.Module]:
            return [SeparableResBlock(width, expansion=expansion, norm_groups=norm_groups) for _ in range(count)]

        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += res_blocks(width, count)
            if level + 1 < len(widths):
                layers.append(SeparableConv(width, widths[level + 1], stride=2))
        head = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, *res_blocks(widths[-1], mid_blocks), nn.SiLU(), head)
        patch = 2 ** (len(widths) - 1)
        self.patches = nn.Conv2d(3, latent_channels, patch, stride=patch)
        nn.init.orthogonal_(self.patches.weight)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layers(images) + self.patches(images))


class ConvAutoencoder(Autoencoder, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A small convolutional encoder with a `TinyDecoder`.

    Latents are normalized per channel by stored statistics to mean 0 and standard deviation 1 over the training images;
    the decoder takes normalized latents. `snapgen.autoencoders.training` trains it.

    Args:
        latent_channels: channels of the latents.
        encoder_widths, encoder_blocks: channels and residual blocks of each encoder level, highest resolution first.
        decoder_widths, decoder_blocks: the same for the decoder, which has as many levels.
        mid_blocks: residual blocks at the lowest resolution, at the end of the encoder and the start of the decoder.
        expansion, norm_groups: see `TinyDecoder`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        encoder_widths: Sequence[int] = (32, 64, 128),
        encoder_blocks: Sequence[int] = (1, 1, 2),
        decoder_widths: Sequence[int] = (32, 64, 128),
        decoder_blocks: Sequence[int] = (1, 2, 3),
        mid_blocks: int = 1,
        expansion: float = 1,
        norm_groups: int = 8,
    ) -> None:
        super().__init__()
        if len(encoder_widths) != len(decoder_widths):
            raise ValueError("encoder_widths and decoder_widths differ in length; give both the same number of levels")
        shape: dict[str, Any] = {
            "latent_channels": latent_channels,
            "mid_blocks": mid_blocks,
            "expansion": expansion,
            "norm_groups": norm_groups,
        }
        self.mean: Tensor
        self.std: Tensor
        self.encoder = Encoder(widths=encoder_widths, blocks=encoder_blocks, **shape)
        self.decoder = TinyDecoder(widths=decoder_widths, blocks=decoder_blocks, **shape)
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))

    @property
    def factor(self) -> int:  # type: ignore[override]
        return cast(int, self.decoder.factor)

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return len(self.mean)

    def _encode(self, images: Tensor) -> Tensor:
        raw: Tensor = self.encoder(images)
        return (raw - self.mean[:, None, None]) / self.std[:, None, None]

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(latents))

    def encode_with_batch_stats(self, images: Tensor) -> Tensor:
        """Latents for training, normalized by the batch's own statistics, through which gradients flow."""
        return functional.batch_norm(self.encoder(images), None, None, training=True)

    @torch.no_grad()
    def measure_latents(self, batches: Iterator[Tensor]) -> None:
        """Set the stored statistics from batches of images (B, 3, H, W) in [-1, 1], over all latent positions."""
        # moments: (2, C), the sums of x and of x²
        total, moments = 0, torch.zeros(2, len(self.mean), dtype=torch.float64, device=self.mean.device)
        for images in batches:
            raw = self.encoder(images).double().transpose(0, 1).flatten(1)  # (B, C, h, w) -> (C, B·h·w)
            moments += torch.stack([raw.sum(1), raw.square().sum(1)])
            total += raw.shape[1]
        mean, square = moments / total
        self.mean.copy_(mean)
        self.std.copy_((square - mean.square()).clamp(min=1e-8).sqrt())  # √(E[x²] − E[x]²)


class KLAutoencoder(Autoencoder):
    """A diffusers AutoencoderKL such as SD3's. Latents are the posterior's mode, normalized as its config says."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net
        self.factor = 2 ** (len(net.config.block_out_channels) - 1)
        self.latent_channels = net.config.latent_channels
        self.scale = latent_scale(net)

    def _encode(self, images: Tensor) -> Tensor:
        return self.scale.normalize(self.net.encode(images).latent_dist.mode())

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.net.decode(self.scale.denormalize(latents)).sample)


class AutoencoderWithDecoder(Autoencoder):
    """An autoencoder whose decoder is replaced by a tiny decoder trained on its latents."""

    def __init__(self, encoder: Autoencoder, decoder: TinyDecoder) -> None:
        super().__init__()
        assert (encoder.factor, encoder.latent_channels) == (decoder.factor, decoder.config.latent_channels)
        self.encoder, self.decoder = encoder, decoder
        self.factor, self.latent_channels = encoder.factor, encoder.latent_channels

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(latents))


class IdentityAutoencoder(Autoencoder):
    """The identity, for training in pixel space: the latents are the pixels."""

    factor = 1
    latent_channels = 3

    def _encode(self, images: Tensor) -> Tensor:
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


def load_autoencoder(name_or_path: str | Path = "emoji") -> Autoencoder:
    """Load an autoencoder in float32 on the CPU, in evaluation mode, with frozen weights.

    Args:
        name_or_path: ``emoji`` (shipped), ``none`` (pixels), a folder written by `ConvAutoencoder.save_pretrained`,
            the folder of a diffusers AutoencoderKL or `PrunedAutoencoderKL`, or that of a pipeline with such a ``vae``.

    Raises:
        InputError: if there is no such autoencoder, or its files are missing, damaged or of another class.
    """
    if name_or_path == IDENTITY:
        return IdentityAutoencoder()
    net = load_vae(_model_folder(name_or_path))
    autoencoder = KLAutoencoder(net) if isinstance(net, AutoencoderKL) else net
    return cast(Autoencoder, autoencoder.eval().requires_grad_(False))


def load_vae(folder: Path) -> ConvAutoencoder | AutoencoderKL:
    """Load the net of an autoencoder from its folder, in float32 on the CPU and in evaluation mode.

    Raises:
        InputError: if its files are missing, damaged or of another class.
    """
    net: ConvAutoencoder | AutoencoderKL = pretrained.load_net(
        folder, ConvAutoencoder, AutoencoderKL, PrunedAutoencoderKL
    )
    if isinstance(net, AutoencoderKL):
        path = folder / pretrained.CONFIG_NAME
        latent_scale(net, path)
        for place in ("in_channels", "out_channels"):
            if net.config[place] != 3:
                problem = f"is {net.config[place]}, where images have 3 channels"
                raise InputError(path, problem, "name an autoencoder of RGB images", place=place)
    return net


def read_decoder(folder: Path) -> TinyDecoder:
    """Load a tiny decoder from its folder, in float32 on the CPU, in evaluation mode, with frozen weights.

    Raises:
        InputError: if its files are missing, damaged or of another class.
    """
    return cast(TinyDecoder, pretrained.load_net(folder, TinyDecoder).requires_grad_(False))


def digest(name_or_path: str | Path = "emoji") -> str:
    """Hex digest (16 digits) of an autoencoder's configuration and weights, independent of its folder's location.

    Raises:
        InputError: if there is no such autoencoder, or files are missing.
    """
    if name_or_path == IDENTITY:
        return digest_contents([], IDENTITY)
    folder = _model_folder(name_or_path)
    # Keys with an underscore are diffusers' metadata, such as its version and the folder's name.
    config = pretrained.read_json(folder / pretrained.CONFIG_NAME)
    config = {key: value for key, value in config.items() if key == "_class_name" or key[0] != "_"}
    return digest_contents(pretrained.weight_files(folder), json.dumps(config, sort_keys=True))


def _model_folder(name_or_path: str | Path) -> Path:
    names = ", ".join([*SHIPPED, IDENTITY])
    remedy = f"name an autoencoder's folder, OWNER/NAME on the hub, or one of: {names}"
    files = [*pretrained.MODEL_FILES, *(f"vae/{file}" for file in pretrained.MODEL_FILES)]
    folder = hub.resolve_model_folder(
        SHIPPED.get(str(name_or_path), name_or_path), files, remedy=remedy, single_file="AutoencoderKL"
    )
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
