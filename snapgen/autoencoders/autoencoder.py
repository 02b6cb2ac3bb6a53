"""Images to latents and back: the small shipped autoencoder, a diffusers AutoencoderKL by path, or pixels as they are.

`load_autoencoder` gives any of them behind one interface, `Autoencoder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from snapgen import config as settings
from snapgen.autoencoders.pruned_decoder import PrunedAutoencoderKL
from snapgen.autoencoders.tiny_decoder import SeparableConv, SeparableResBlock, TinyDecoder, check_levels
from snapgen.errors import InputError
from snapgen.io import hub, pretrained

SHIPPED = {"emoji": Path(__file__).parent / "weights" / "emoji"}
"""Autoencoders that come with the package, by name."""
PIXELS = "none"
"""The name of the pass-through."""


class Autoencoder(nn.Module):
    """What every autoencoder offers; deterministic both ways, any size that ``factor`` divides."""

    factor: int
    """Pixels along a side of the image for one of the latent."""
    latent_channels: int

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, latent_channels, H/factor, W/factor) of about unit scale.

        Raises:
            ValueError: if ``factor`` does not divide the size.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {width}×{height} do not fit; use a resolution that {self.factor} divides")
        return self._encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as `encode` gives them to images in [-1, 1]."""
        return self._decode(latents).clamp(-1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class Encoder(nn.Module):
    """The tiny decoder mirrored: blocks at a level's width, then a stride-2 separable convolution to the next.

    A linear code of each patch of pixels is added to its output, so that training starts from one instead of from
    noise (its error falls by a quarter within 50 steps). Its head has no norm: one there would take an image's contrast
    out of its latent. Nor does it normalise the latents: see `ConvAutoencoder`.
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

        def thin(width: int, count: int) -> list[nn.Module]:
            return [SeparableResBlock(width, expansion=expansion, norm_groups=norm_groups) for _ in range(count)]

        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += thin(width, count)
            if level + 1 < len(widths):
                layers.append(SeparableConv(width, widths[level + 1], stride=2))
        head = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, *thin(widths[-1], mid_blocks), nn.SiLU(), head)
        patch = 2 ** (len(widths) - 1)
        self.patches = nn.Conv2d(3, latent_channels, patch, stride=patch)
        nn.init.orthogonal_(self.patches.weight)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layers(images) + self.patches(images))


class ConvAutoencoder(Autoencoder, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A small convolutional encoder with a `TinyDecoder`.

    Latents are normalised per channel by stored statistics to mean 0 and standard deviation 1 over the training
    images; the decoder takes them normalised. Training: `snapgen.autoencoders.training`.

    Args:
        latent_channels: channels of the latents.
        encoder_widths, encoder_blocks: channels and residual blocks of each level, highest resolution first.
        decoder_widths, decoder_blocks: likewise; as many levels.
        mid_blocks: residual blocks at the lowest resolution, between encoder and latent and between latent and decoder.
        expansion, norm_groups: as `TinyDecoder`.
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
            raise ValueError("encoder_widths and decoder_widths differ in levels; give both the same number")
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

    def encode_normalised_by_batch(self, images: Tensor) -> Tensor:
        """Latents in training: normalised by the batch's own statistics, through which gradients flow."""
        return functional.batch_norm(self.encoder(images), None, None, training=True)

    @torch.no_grad()
    def measure_latents(self, batches: Iterator[Tensor]) -> None:
        """Sets the stored statistics from batches of images (B, 3, H, W) in [-1, 1]; every latent position counts."""
        total, moments = 0, torch.zeros(2, len(self.mean), dtype=torch.float64, device=self.mean.device)
        for images in batches:
            raw = self.encoder(images).double().transpose(0, 1).flatten(1)  # BCHW → CN
            moments += torch.stack([raw.sum(1), raw.square().sum(1)])
            total += raw.shape[1]
        mean, square = moments / total
        self.mean.copy_(mean)
        self.std.copy_((square - mean.square()).clamp(min=1e-8).sqrt())


class KLAutoencoder(Autoencoder):
    """A diffusers AutoencoderKL, SD3's for one: the posterior's mode, shifted and scaled as its configuration says."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net
        self.factor = 2 ** (len(net.config.block_out_channels) - 1)
        self.latent_channels = net.config.latent_channels
        self.scale: float = net.config.scaling_factor
        self.shift: float = net.config.shift_factor or 0.0

    def _encode(self, images: Tensor) -> Tensor:
        return cast(Tensor, (self.net.encode(images).latent_dist.mode() - self.shift) * self.scale)

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.net.decode(latents / self.scale + self.shift).sample)


class AutoencoderWithDecoder(Autoencoder):
    """One autoencoder's latents, decoded by a tiny decoder that was trained on them."""

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
    """No autoencoder: the latents are the pixels."""

    factor = 1
    latent_channels = 3

    def _encode(self, images: Tensor) -> Tensor:
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


def load_autoencoder(name_or_path: str | Path = "emoji") -> Autoencoder:
    """An autoencoder in float32 on the CPU, in evaluation mode, without gradients of its weights.

    Args:
        name_or_path: ``emoji`` (shipped), ``none`` (pixels), a folder written by `ConvAutoencoder.save_pretrained`,
            or a folder of a diffusers AutoencoderKL or a `PrunedAutoencoderKL` (or of a pipeline, whose ``vae`` is
            taken).

    Raises:
        InputError: if there is no such autoencoder, or its files are missing, damaged or of another kind.
    """
    if name_or_path == PIXELS:
        return IdentityAutoencoder()
    folder = _folder(name_or_path)
    kinds = {kind.__name__: kind for kind in (ConvAutoencoder, AutoencoderKL, PrunedAutoencoderKL)}
    kind = _config(folder).get("_class_name")
    if kind not in kinds:
        raise InputError(
            folder / "config.json",
            f"describes {kind or 'no model'}",
            f"name the folder of one of: {', '.join(kinds)}",
            place="_class_name",
        )
    net = _read(folder, kinds[kind])
    loaded = KLAutoencoder(net) if isinstance(net, AutoencoderKL) else net
    return cast(Autoencoder, loaded.eval().requires_grad_(False))


def read_decoder(folder: Path) -> TinyDecoder:
    """A tiny decoder from its folder, as `load_autoencoder` reads an autoencoder."""
    kind = _config(folder).get("_class_name")
    if kind != "TinyDecoder":
        raise InputError(
            folder / "config.json", f"describes {kind}", "name a TinyDecoder's folder", place="_class_name"
        )
    return cast(TinyDecoder, _read(folder, TinyDecoder).eval().requires_grad_(False))


def digest(name_or_path: str | Path = "emoji") -> str:
    """Hex digest (16 digits) of an autoencoder's configuration and weights, wherever its folder lies.

    Raises:
        InputError: as `load_autoencoder`, for what is missing.
    """
    if name_or_path == PIXELS:
        return hashlib.sha256(PIXELS.encode()).hexdigest()[:16]
    folder = _folder(name_or_path)
    # Keys with an underscore are diffusers' notes: its version, the folder's name.
    config = {key: value for key, value in _config(folder).items() if key == "_class_name" or key[0] != "_"}
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with _weights(folder).open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()[:16]


def _folder(name_or_path: str | Path) -> Path:
    names = ", ".join([*SHIPPED, PIXELS])
    remedy = f"name an autoencoder's folder, OWNER/NAME on the hub, or one of: {names}"
    files = [*pretrained.WEIGHTS, *(f"vae/{file}" for file in pretrained.WEIGHTS)]
    folder = hub.resolve_model_folder(SHIPPED.get(str(name_or_path), name_or_path), files, remedy=remedy)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _config(folder: Path) -> dict[str, Any]:
    return settings.read_mapping(folder / "config.json")


def _weights(folder: Path) -> Path:
    found = sorted(folder.glob("diffusion_pytorch_model*.safetensors"), key=lambda path: len(path.name))
    if not found:
        raise InputError(folder, "holds no diffusion_pytorch_model.safetensors", "restore it or name another folder")
    return found[0]


def _read(folder: Path, model: type[ModelMixin]) -> ModelMixin:
    """The model of a folder, every weight of it read from the file and finite."""
    weights = _weights(folder)
    variant = weights.name.removeprefix("diffusion_pytorch_model").removesuffix(".safetensors").strip(".")
    try:
        net, info = model.from_pretrained(
            folder,
            variant=variant or None,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers, safetensors and torch each raise kinds of their own for a damaged file
        text = str(error).strip().splitlines()
        raise InputError(
            weights, f"cannot be read ({text[0][:120] if text else type(error).__name__})", "fetch or train it again"
        ) from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise InputError(weights, "does not fit config.json", "use both files of one training", place=wrong[0])
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(weights, "holds values that are not finite", "fetch or train it again", place=name)
    return net
