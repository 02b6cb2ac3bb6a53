"""The stage that trains a tiny decoder for the recipe's frozen encoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archsearch.stats.estimate import Estimate
from archsearch.training.evaluation import SamplingConfig
from archsearch.training.log import TrainLog
from snapgen.autoencoders import psnr
from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder
from snapgen.autoencoders.training import DecoderTrainer, build_tiny_decoder
from snapgen.data.dataset import ImageDataset
from snapgen.training.loop import REPORTS
from snapgen.training.stages import DecoderStage

if TYPE_CHECKING:
    from archsearch.training.data import RecipeData
    from archsearch.training.run_folder import RunFolder

HELD_OUT = 400
"""Held-out images that a decoder's PSNR is taken on."""


def train_decoder(
    stage: DecoderStage,
    log: TrainLog,
    *,
    number: int,
    material: RecipeData,
    folder: RunFolder,
    device: torch.device,
    save: Callable[[DecoderTrainer], None],
    save_seconds: float,
) -> None:
    """Train the decoder, or go on with it, and leave it as the stage's result.

    Args:
        number: of the stage in its recipe.
        material: the recipe's images and its autoencoder.
        folder: of the run.
        device: where to train.
        save: writes a checkpoint.
        save_seconds: time between checkpoints.

    Raises:
        InputError: if no tiny decoder is for such an encoder, or nothing can be written.
    """
    settings, coder = stage.training, material.autoencoder
    decoder = build_tiny_decoder(coder, seed=settings.seed, **stage.decoder).to(device)
    pixels = {side: first(material.images("train", side), stage.held) for side in sorted(set(settings.resolutions))}
    training = DecoderTrainer(decoder, pixels, settings, coder)
    parts, facts = folder.read_checkpoint(number)
    if facts is not None:
        with folder.fitting_checkpoint():
            training.load(parts, facts)
    log.begin(training.done)
    pending: list[dict[str, Tensor]] = []
    every, began, saved = max(1, settings.steps // REPORTS), time.monotonic(), time.monotonic()
    while training.done < settings.steps:
        pending.append(training.step())
        if training.done % every and training.done < settings.steps:
            continue
        names = list(pending[-1])
        means = {name: float(torch.stack([p[name] for p in pending if name in p]).mean()) for name in names}
        log.decoder_row(training.done, settings.steps, means, seconds=time.monotonic() - began)
        pending, began = [], time.monotonic()
        if time.monotonic() - saved >= save_seconds and training.done < settings.steps:
            save(training)
            saved = time.monotonic()
    training.finish()
    largest = max(settings.resolutions)
    numbers = psnrs(
        {"encoder's own": coder, "psnr": AutoencoderWithDecoder(coder, decoder)}, material.images("val", largest)
    )
    log.measured(settings.steps, numbers, SamplingConfig(steps=0, guidance=1, shift=1))
    folder.finish(number, decoder.to("cpu").save_pretrained)


def psnrs(coders: dict[str, Autoencoder], images: ImageDataset) -> dict[str, Estimate]:
    """How well autoencoders give held-out images back, in dB."""
    pixels = first(images, HELD_OUT)
    found = {}
    for name, coder in coders.items():
        device = next(coder.parameters()).device
        measured = psnr.psnr(coder, pixels.to(device))
        found[name] = Estimate(value=measured.value, low=measured.low, high=measured.high)
    return found


def first(images: ImageDataset, count: int) -> Tensor:
    """The first images, at most so many: (N, 3, H, W) uint8."""
    found: list[Tensor] = []
    for batch in images.batches(256):
        found.append(batch)
        if len(found) * 256 >= count:
            break
    return torch.cat(found)[:count]
