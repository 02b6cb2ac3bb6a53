"""Stage that trains a tiny decoder for the latents of the recipe's frozen autoencoder."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archsearch.quality.evaluator import SamplingConfig
from archsearch.stats.estimate import Estimate
from archsearch.training.log import TrainLog
from snapgen.autoencoders import psnr
from snapgen.autoencoders.autoencoder import Autoencoder, AutoencoderWithDecoder
from snapgen.autoencoders.training import DecoderTrainer, build_tiny_decoder
from snapgen.data.dataset import ImageDataset
from snapgen.training.loop import MIN_REPORTS
from snapgen.training.stages import DecoderStage

if TYPE_CHECKING:
    from archsearch.studies.signals import StopRequest
    from archsearch.training.run_folder import RunFolder
    from snapgen.training.data import TrainingData

NO_SAMPLING = SamplingConfig(num_inference_steps=0, guidance_scale=1, timestep_shift=1)
NUM_HELDOUT = 400
"""Number of held-out images on which the PSNR of a decoder is measured."""


def train_decoder(
    stage: DecoderStage,
    log: TrainLog,
    *,
    number: int,
    data: TrainingData,
    folder: RunFolder,
    device: torch.device,
    save: Callable[[DecoderTrainer], None],
    save_seconds: float,
    stop: StopRequest,
) -> None:
    """Train the decoder, or resume its training, and write it as the stage's result.

    Args:
        stage: the stage.
        log: log of the stage.
        number: index of the stage in the recipe.
        data: the recipe's images and autoencoder.
        folder: folder of the run.
        device: device to train on.
        save: writes a checkpoint.
        save_seconds: time between checkpoints.
        stop: whether the user has asked to stop.

    Raises:
        InputError: if no tiny decoder fits the autoencoder, or a file cannot be written.
    """
    settings, autoencoder = stage.training, data.autoencoder
    decoder = build_tiny_decoder(autoencoder, seed=settings.seed, **stage.decoder).to(device)
    pixels = {
        resolution: first_images(data.images("train", resolution), stage.max_images)
        for resolution in sorted(set(settings.resolutions))
    }
    trainer = DecoderTrainer(decoder, pixels, settings, autoencoder)
    tensors, metadata = folder.read_checkpoint(number)
    if metadata is not None:
        with folder.checkpoint_errors():
            trainer.load(tensors, metadata)
    log.start(trainer.done)
    pending: list[dict[str, Tensor]] = []
    interval, began, saved = max(1, settings.steps // MIN_REPORTS), time.monotonic(), time.monotonic()
    while trainer.done < settings.steps:
        pending.append(trainer.step())
        if stop.requested:
            save(trainer)
            raise KeyboardInterrupt
        if trainer.done % interval and trainer.done < settings.steps:
            continue
        log.log_decoder_stats(trainer.done, settings.steps, _mean_losses(pending), seconds=time.monotonic() - began)
        pending, began = [], time.monotonic()
        if time.monotonic() - saved >= save_seconds and trainer.done < settings.steps:
            save(trainer)
            saved = time.monotonic()
    trainer.finish()
    autoencoders = {"encoder's own": autoencoder, "psnr": AutoencoderWithDecoder(autoencoder, decoder)}
    numbers = psnrs(autoencoders, data.images("val", max(settings.resolutions)))
    log.log_evaluation(settings.steps, numbers, NO_SAMPLING)
    folder.write_result(number, decoder.to("cpu").save_pretrained)


def _mean_losses(steps: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
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
