"""How well an autoencoder gives images back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from snapgen import seeding
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.data.pixels import BATCH, to_float, to_uint8

DecodeFn = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class Psnr:
    """Mean over images of the peak signal-to-noise ratio in dB, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.value:.2f} dB [{self.low:.2f}, {self.high:.2f}], {self.images} images"


@torch.no_grad()
def psnr(autoencoder: Autoencoder, pixels: Tensor, *, seed: int = 0, resamples: int = 1000) -> Psnr:
    """How well images (N, 3, H, W), uint8, come back, as uint8 again."""

    def again(pixels: Tensor) -> Tensor:
        return autoencoder.decode(autoencoder.encode(to_float(pixels)))

    return _mean((_ratios(again(batch), batch) for batch in torch.split(pixels, BATCH)), seed, resamples)


@torch.no_grad()
def decoder_psnr(
    decode: DecodeFn, reference: DecodeFn, latents: Tensor, *, seed: int = 0, resamples: int = 1000
) -> Psnr:
    """How well a decoder's images of latents (N, C, h, w) agree with another's, both as uint8."""
    batches = torch.split(latents, BATCH)
    return _mean((_ratios(decode(batch), to_uint8(reference(batch))) for batch in batches), seed, resamples)


def _mean(found: Iterable[Tensor], seed: int, resamples: int) -> Psnr:
    by_image = torch.cat([ratios.cpu() for ratios in found])
    random = torch.Generator().manual_seed(seeding.derive_seed(seed, "psnr"))
    drawn = torch.randint(len(by_image), (resamples, len(by_image)), generator=random)
    low, high = by_image[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Psnr(by_image.mean().item(), low, high, len(by_image))


def _ratios(decoded: Tensor, pixels: Tensor) -> Tensor:
    # Half a grey level is the least error told apart: a flat image comes back exactly, and its ratio would be infinite.
    error = (to_uint8(decoded).double() - pixels).square().flatten(1).mean(1).clamp(min=0.25)
    return 10 * torch.log10(255**2 / error)
