"""Train the small autoencoder, or a tiny decoder for a given encoder, into a folder; a killed training resumes."""

from __future__ import annotations

import copy
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from snapgen.autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderWithDecoder,
    ConvAutoencoder,
    digest,
    load_autoencoder,
    read_decoder,
)
from snapgen.autoencoders.psnr import Psnr, psnr
from snapgen.autoencoders.stepwise import CheckpointSession
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.autoencoders.training import (
    DecoderTrainer,
    DecoderTrainingConfig,
    ImagesByResolution,
    build_tiny_decoder,
    new_autoencoder,
)
from snapgen.data.dataset import load_dataset
from snapgen.devices import torch_threads
from snapgen.errors import InputError
from snapgen.io.atomic import write_errors
from snapgen.io.cache import JSON
from snapgen.progress import ProgressCallback, ignore_progress

CHECKPOINT = "checkpoint.safetensors"


def train_to_folder(
    out: Path,
    *,
    minutes: float = 8,
    steps: int | None = None,
    data: str = "emoji",
    resolutions: tuple[int, ...] = (32, 32, 64),
    encoder: str | None = None,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
    log: Callable[[str], None] = lambda _: None,
) -> dict[int, Psnr]:
    """Train on one thread, and write the weights, their configuration and a README.

    Killed at any moment, the same call resumes from ``out/checkpoint.safetensors`` and ends with the same weights.

    Args:
        out: the folder to write.
        minutes: time to train, which a few timed steps translate into a number of steps.
        steps: steps to train, whatever time they take.
        data: ``emoji``, a folder of images or webdataset shards.
        resolutions: sides of the training images in pixels, taken in turn.
        encoder: an autoencoder for whose encoder a tiny decoder is trained; None: train the small autoencoder.
        seed: everything random follows from it.
        log: takes a line about what is trained.

    Returns:
        The agreement of decoded validation images with the originals, by resolution.

    Raises:
        InputError: if something that is named cannot be loaded, the checkpoint is of other arguments, or the folder
            cannot be written.
    """
    training = DecoderTrainingConfig(resolutions=resolutions, seed=seed)
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "name a folder")
    given = load_autoencoder(encoder) if encoder else None
    opened = {side: load_dataset(data, split="train", resolution=side) for side in sorted(set(training.resolutions))}
    digests = {str(side): images.digest for side, images in opened.items()}
    asked: dict[str, JSON] = {"--minutes": None if steps else minutes, "--steps": steps}
    session = CheckpointSession(out / CHECKPOINT, asked | _identity(training, digests, encoder))
    images = {side: each.pixels for side, each in opened.items()}
    model = build_tiny_decoder(given, seed=seed) if given else new_autoencoder(seed)
    with torch_threads(1):
        steps = session.steps or steps or steps_for(minutes, model, images, training, encoder=given)
        training = training.model_copy(update={"steps": steps})
        run = DecoderTrainer(model, images, training, given)
        session.restore(run)
        resumed = f", from step {run.done} on" if run.done else ""
        log(f"{training!r} on {len(images[training.resolutions[0]])} images of {data}, one thread{resumed}")
        session.complete(run, progress)
        command = f"--steps {steps} --data {data} --resolutions {','.join(map(str, resolutions))} --seed {seed}"
        command += f" --encoder {encoder}" if encoder else ""
        with _writing_into(out) as folder:
            cast(Any, model).half().save_pretrained(folder)
            trained = AutoencoderWithDecoder(given, read_decoder(folder)) if given else load_autoencoder(folder)
            heldout = {side: load_dataset(data, split="val", resolution=side).pixels for side in images}
            quality = {side: psnr(trained, pixels) for side, pixels in heldout.items()}
            (folder / "README.md").write_text(_card(trained, training, quality, command, session.seconds / 60))
    session.path.unlink(missing_ok=True)
    return quality


def steps_for(
    minutes: float,
    model: ConvAutoencoder | TinyDecoder,
    images: ImagesByResolution,
    training: DecoderTrainingConfig,
    *,
    encoder: Autoencoder | None = None,
) -> int:
    """The number of steps that fit into so many minutes here, from a few timed ones."""
    few = {side: pixels[:64] for side, pixels in images.items()}
    marks: list[float] = []
    timed = DecoderTrainer(copy.deepcopy(model), few, training.model_copy(update={"steps": 22}), encoder)
    timed.complete(lambda *_: marks.append(time.perf_counter()))
    return max(1, int(60 * minutes * (len(marks) - 2) / (marks[-1] - marks[1])))


def _identity(training: DecoderTrainingConfig, data: dict[str, str], encoder: str | None) -> dict[str, JSON]:
    """The settings, data and encoder that the weights depend on: a checkpoint of another identity is not resumed."""
    return {
        "--resolutions": list(training.resolutions),
        "--seed": training.seed,
        "--data": data,
        "--encoder": digest(encoder) if encoder else None,
        "settings": training.model_dump(mode="json"),
        "torch": torch.__version__,
    }


@contextmanager
def _writing_into(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` whose files take their places in it at the end."""
    with write_errors(out, "make room and give the same command again"):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir()):
                file.chmod(0o644)
                file.replace(out / file.name)


def _card(
    trained: Autoencoder, training: DecoderTrainingConfig, quality: Mapping[int, Psnr], command: str, minutes: float
) -> str:
    """The README of a trained folder."""
    size = sum(parameter.numel() for parameter in cast(nn.Module, trained.decoder).parameters())
    rows = "\n".join(f"| {side} px | {value} |" for side, value in quality.items())
    return f"""# {type(trained).__name__}: {trained.latent_channels} latent channels, factor {trained.factor}

Made by `archsearch train-autoencoder --out FOLDER {command}`
on {time.strftime("%Y-%m-%d")}: {minutes:.1f} minutes of one thread of {platform.processor() or platform.machine()},
torch {torch.__version__}. Weights in half precision; the decoder has {size:,} parameters.

| validation images | PSNR, with the 95 % interval of its mean |
|---|---|
{rows}

Settings: `{training.model_dump_json()}`
"""
