"""The command that trains the small autoencoder, or a tiny decoder for an encoder that is given.

    python -m archsearch.cli.autoencoder --out runs/autoencoder --minutes 8
    python -m archsearch.cli.autoencoder --out runs/decoder --encoder path/to/sd3/vae --resolutions 256

The same command goes on where it was killed, to the same weights.
"""

from __future__ import annotations

import copy
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import rich.progress
import torch
import typer
from safetensors import SafetensorError
from torch import Tensor, nn

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderWithDecoder,
    ConvAutoencoder,
    load_autoencoder,
    read_decoder,
)
from snapgen.autoencoders.psnr import Psnr, psnr
from snapgen.autoencoders.tiny_decoder import TinyDecoder
from snapgen.autoencoders.training import (
    DecoderTrainer,
    DecoderTrainingConfig,
    ImagesByResolution,
    build_tiny_decoder,
    new_autoencoder,
)
from snapgen.data.dataset import open_images
from snapgen.errors import InputError
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import CheckpointSession, StepCallback

CHECKPOINT = "checkpoint.safetensors"


def steps_for(
    minutes: float,
    model: ConvAutoencoder | TinyDecoder,
    images: ImagesByResolution,
    training: DecoderTrainingConfig,
    *,
    encoder: Autoencoder | None = None,
) -> int:
    """Steps that fit into so many minutes here, from a few timed ones."""
    few = {side: pixels[:64] for side, pixels in images.items()}
    marks: list[float] = []
    timed = DecoderTrainer(copy.deepcopy(model), few, training.model_copy(update={"steps": 22}), encoder)
    timed.complete(lambda *_: marks.append(time.perf_counter()))
    return max(1, int(60 * minutes * (len(marks) - 2) / (marks[-1] - marks[1])))


def main(
    out: Annotated[Path, typer.Option(help="Folder that gets the weights, their configuration and a README.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train; sets the steps by a few timed ones.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train, whatever time they take.")] = None,
    data: Annotated[str, typer.Option(help="emoji, a folder of images or webdataset shards.")] = "emoji",
    resolutions: Annotated[str, typer.Option(help="Sides of the images in pixels, taken in turn.")] = "32,32,64",
    encoder: Annotated[str | None, typer.Option(help="Train a tiny decoder for this autoencoder's encoder.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    quiet: Annotated[bool, typer.Option(help="Only the result, in one line.")] = False,
) -> None:
    """Train the small autoencoder, or a tiny decoder for an encoder that is given, on one thread.

    Killed at any moment, it goes on with the same command from FOLDER/checkpoint.safetensors.

    Example: python -m archsearch.cli.autoencoder --out runs/autoencoder --minutes 8
    """
    torch.set_num_threads(1)
    training = DecoderTrainingConfig(resolutions=_sides(resolutions), seed=seed)
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "name a folder")
    given = load_autoencoder(encoder) if encoder else None
    opened = {side: open_images(data, split="train", resolution=side) for side in sorted(set(training.resolutions))}
    asked: dict[str, JSON] = {
        "--minutes": None if steps else minutes,
        "--steps": steps,
        "--resolutions": list(training.resolutions),
        "--seed": seed,
        "--data": {str(side): images.digest for side, images in opened.items()},
        "--encoder": autoencoder.digest(encoder) if encoder else None,
        "settings": training.model_dump(mode="json"),
        "torch": torch.__version__,
    }
    kept = CheckpointSession(out / CHECKPOINT, asked)
    images = {side: each.pixels for side, each in opened.items()}
    model = build_tiny_decoder(given, seed=seed) if given else new_autoencoder(seed)
    fitting = kept.steps or steps or steps_for(minutes, model, images, training, encoder=given)
    training = training.model_copy(update={"steps": fitting})
    run = DecoderTrainer(model, images, training, given)
    kept.restore(run)
    if not quiet:
        going_on = f", from step {run.done} on" if run.done else ""
        typer.echo(f"{training!r} on {len(images[training.resolutions[0]])} images of {data}, one thread{going_on}")
    with _telling(fitting, quiet=quiet) as progress:
        run.complete(kept.keeping(run, progress))
    command = f"--steps {fitting} --data {data} --resolutions {resolutions} --seed {seed}"
    command += f" --encoder {encoder}" if encoder else ""
    with _aside(out) as folder:
        cast(Any, model).half().save_pretrained(folder)
        trained = AutoencoderWithDecoder(given, read_decoder(folder)) if given else load_autoencoder(folder)
        quality = {side: psnr(trained, open_images(data, split="val", resolution=side).pixels) for side in images}
        (folder / "README.md").write_text(_card(trained, training, quality, command, kept.seconds / 60))
    kept.path.unlink(missing_ok=True)
    typer.echo(f"{out}: " + "; ".join(f"{side} px {value}" for side, value in quality.items()))


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` whose files take their places in it at the end."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir()):
                file.chmod(0o644)
                file.replace(out / file.name)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise InputError(out, f"cannot be written ({problem})", "make room and give the same command again") from None


def _card(
    trained: Autoencoder, training: DecoderTrainingConfig, quality: Mapping[int, Psnr], command: str, minutes: float
) -> str:
    decoder = cast(nn.Module, trained.decoder)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    rows = "\n".join(f"| {side} px | {value} |" for side, value in quality.items())
    return f"""# {type(trained).__name__}: {trained.latent_channels} latent channels, factor {trained.factor}

Made by `python -m archsearch.cli.autoencoder --out FOLDER {command}`
on {time.strftime("%Y-%m-%d")}: {minutes:.1f} minutes of one thread of {platform.processor() or platform.machine()},
torch {torch.__version__}. Weights in half precision; the decoder has {size:,} parameters.

| validation images | PSNR, with the 95 % interval of its mean |
|---|---|
{rows}

Settings: `{training.model_dump_json()}`
"""


@contextmanager
def _telling(steps: int, *, quiet: bool) -> Iterator[StepCallback | None]:
    """A bar with the time left on a terminal, plain lines elsewhere."""
    if quiet or not sys.stdout.isatty():
        yield None if quiet else _say
        return
    with rich.progress.Progress() as bar:
        task = bar.add_task("training", total=steps)
        yield lambda step, _steps, losses: bar.update(task, completed=step, description=f"loss {losses['mse']:.4f}")


def _say(step: int, steps: int, losses: Mapping[str, Tensor]) -> None:
    if step % 100 == 0 or step == steps:
        typer.echo(f"step {step}/{steps}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def _sides(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
        raise InputError("--resolutions", f"{text!r} are no sides of images", "write e.g. 32,64 (16 or more each)")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
