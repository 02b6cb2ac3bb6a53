"""The stage that trains a tiny decoder for the recipe's frozen encoder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archsearch.score import Estimate
from snapgen import reconstruction
from snapgen.autoencoder import Autoencoder, WithDecoder
from snapgen.data import Images
from snapgen.decoder_training import DecoderTraining, tiny_decoder_for
from snapgen.loop import REPORTS
from snapgen.stages import DecoderStage
from studies.evaluation import Sampler
from studies.trainlog import TrainLog

if TYPE_CHECKING:
    from studies.training import Training

HELD_OUT = 400
"""Held-out images that a decoder's PSNR is taken on."""


def train_decoder(run: Training, number: int, stage: DecoderStage, log: TrainLog) -> None:
    """Train the decoder, or go on with it, and leave it as the stage's result.

    Raises:
        InputError: if no tiny decoder is for such an encoder, or nothing can be written.
    """
    settings, coder = stage.training, run.material.autoencoder
    decoder = tiny_decoder_for(coder, seed=settings.seed, **stage.decoder).to(run.device)
    pixels = {side: first(run.material.images("train", side), stage.held) for side in sorted(set(settings.resolutions))}
    training = DecoderTraining(decoder, pixels, settings, coder)
    parts, facts = run.folder.read_checkpoint(number)
    if facts is not None:
        with run.folder.fitting_checkpoint():
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
        if time.monotonic() - saved >= 60 * run.recipe.checkpoint_minutes and training.done < settings.steps:
            run.save(number, training.state()[0], training.done)
            saved = time.monotonic()
    training.finish()
    largest = max(settings.resolutions)
    numbers = psnrs({"encoder's own": coder, "psnr": WithDecoder(coder, decoder)}, run.material.images("val", largest))
    log.measured(settings.steps, numbers, Sampler(steps=0, guidance=1, shift=1))
    run.folder.finish(number, decoder.to("cpu").save_pretrained)


def psnrs(coders: dict[str, Autoencoder], images: Images) -> dict[str, Estimate]:
    """How well autoencoders give held-out images back, in dB."""
    pixels = first(images, HELD_OUT)
    found = {}
    for name, coder in coders.items():
        device = next(coder.parameters()).device
        measured = reconstruction.psnr(coder, pixels.to(device))
        found[name] = Estimate(value=measured.value, low=measured.low, high=measured.high)
    return found


def first(images: Images, count: int) -> Tensor:
    """The first images, at most so many: (N, 3, H, W) uint8."""
    found: list[Tensor] = []
    for batch in images.batches(256):
        found.append(batch)
        if len(found) * 256 >= count:
            break
    return torch.cat(found)[:count]
