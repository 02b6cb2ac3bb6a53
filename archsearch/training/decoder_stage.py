"""Parts of the stage that trains a tiny decoder for the latents of the recipe's frozen autoencoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from archsearch.quality.evaluator import SamplingConfig
from archsearch.stats.estimate import Estimate
from snapgen.autoencoders import psnr
from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.autoencoders.training import DecoderTrainer, build_tiny_decoder
from snapgen.data.dataset import ImageDataset
from snapgen.training.stages import DecoderStage

if TYPE_CHECKING:
    from snapgen.training.data import TrainingData

NO_SAMPLING = SamplingConfig(num_inference_steps=0, guidance_scale=1, timestep_shift=1)
NUM_HELDOUT = 400
"""Number of held-out images on which the PSNR of a decoder is measured."""


def decoder_trainer(stage: DecoderStage, data: TrainingData, device: torch.device) -> DecoderTrainer:
    """The training of a stage's new decoder, for the latents of the recipe's autoencoder.

    Raises:
        InputError: if no tiny decoder fits the autoencoder.
    """
    settings, autoencoder = stage.training, data.autoencoder
    decoder = build_tiny_decoder(autoencoder, seed=settings.seed, **stage.decoder).to(device)
    pixels = {
        resolution: first_images(data.images("train", resolution), stage.max_images)
        for resolution in sorted(set(settings.resolutions))
    }
    return DecoderTrainer(decoder, pixels, settings, autoencoder)


def evaluate(trainer: DecoderTrainer, data: TrainingData) -> dict[str, Estimate]:
    """PSNR of a trained decoder, and of the autoencoder's own, at the highest resolution of the training."""
    own, decoder = data.autoencoder, cast(TinyDecoder, trainer.model)
    autoencoders = {"encoder's own": own, "psnr": AutoencoderWithDecoder(own, decoder)}
    return psnrs(autoencoders, data.images("val", max(trainer.training.resolutions)))


def mean_losses(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each loss of the last step over the steps that have it."""
    return {name: float(torch.stack([losses[name] for losses in steps if name in losses]).mean()) for name in steps[-1]}


def psnrs(autoencoders: dict[str, Autoencoder], images: ImageDataset) -> dict[str, Estimate]:
    """PSNR of autoencoders on held-out images, in dB, by name."""
    pixels = first_images(images, NUM_HELDOUT)
    measured = {name: psnr.psnr(each, pixels.to(next(each.parameters()).device)) for name, each in autoencoders.items()}
    return {name: Estimate(value=each.value, low=each.low, high=each.high) for name, each in measured.items()}


def first_images(images: ImageDataset, count: int) -> Tensor:
    """The first images, at most ``count``: (N, 3, H, W) uint8."""
    return torch.cat([*itertools.islice(images.batches(256), math.ceil(count / 256))])[:count]
