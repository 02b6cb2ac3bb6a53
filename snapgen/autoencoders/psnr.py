"""Peak signal-to-noise ratio of an autoencoder's reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from snapgen import seeding
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.data.pixels import INFERENCE_BATCH_SIZE, to_float, to_uint8

DecodeFn = Callable[[Tensor], Tensor]
"""A decoder: latents (B, C, h, w) → images (B, 3, H, W) in [-1, 1]."""
RESAMPLES = 1000


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
def psnr(autoencoder: Autoencoder, pixels: Tensor) -> Psnr:
    """PSNR of an autoencoder's reconstructions of uint8 images (N, 3, H, W), rounded to uint8."""

    def reconstruct(pixels: Tensor) -> Tensor:
        return autoencoder.decode(autoencoder.encode(to_float(pixels)))

    batches = torch.split(pixels, INFERENCE_BATCH_SIZE)
    return _mean(_psnr_per_image(reconstruct(batch), batch) for batch in batches)


@torch.no_grad()
def decoder_psnr(decode: DecodeFn, reference: DecodeFn, latents: Tensor) -> Psnr:
    """PSNR of a decoder's images against a reference decoder's for latents (N, C, h, w), both rounded to uint8."""
    batches = torch.split(latents, INFERENCE_BATCH_SIZE)
    return _mean(_psnr_per_image(decode(batch), to_uint8(reference(batch))) for batch in batches)


def _mean(batches: Iterable[Tensor]) -> Psnr:
    """Mean over images with a percentile bootstrap interval."""
    by_image = torch.cat([batch.cpu() for batch in batches])
    random = torch.Generator().manual_seed(seeding.derive_seed(0, "psnr"))
    resampled = torch.randint(len(by_image), (RESAMPLES, len(by_image)), generator=random)
    # (RESAMPLES, images) → (RESAMPLES,) → both ends of the interval
    low, high = by_image[resampled].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Psnr(by_image.mean().item(), low, high, len(by_image))


def _psnr_per_image(decoded: Tensor, pixels: Tensor) -> Tensor:
    """PSNR in dB of images (B, 3, H, W) against uint8 pixels: (B,)."""
    # An error of half a gray level is the smallest that counts; a flat image is reconstructed exactly, with infinite
    # PSNR.
    mse = (to_uint8(decoded).double() - pixels).square().flatten(1).mean(1).clamp(min=0.25)
    return 10 * torch.log10(255**2 / mse)  # 10·log₁₀(MAX² / MSE)
