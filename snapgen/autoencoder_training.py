"""Training of the small autoencoder, or of a tiny decoder for an encoder that is given (SnapGen, section 3.2).

    python -m snapgen.autoencoder_training --out runs/autoencoder --minutes 8
    python -m snapgen.autoencoder_training --out runs/decoder --encoder path/to/sd3/vae --resolutions 256

Both parts learn together at first; then the encoder is frozen and the decoder goes on against a discriminator of
patches. An encoder that is given is frozen from the start, and what is trained and written is a `TinyDecoder`.
"""

from __future__ import annotations

import copy
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import rich.progress
import torch
import typer
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from snapgen import seeds
from snapgen.autoencoder import Autoencoder, ConvAutoencoder, WithDecoder, load, read_decoder
from snapgen.data import open_images
from snapgen.errors import InputError
from snapgen.optimizers import Optimizers
from snapgen.perceptual import PerceptualLoss
from snapgen.reconstruction import BATCH, Psnr, as_float, psnr
from snapgen.settings import Settings
from snapgen.tiny_decoder import PAPER, TinyDecoder
from snapgen.training import Average

Pixels = Mapping[int, Tensor]
"""Images by resolution: uint8 (N, 3, resolution, resolution)."""
Progress = Callable[[int, int, Mapping[str, float]], None]
"""Told the step, the steps in all and the losses of the step."""

MEASURED = 800
"""Images of each resolution that the latents' statistics are taken from; 800 hold 51,200 latent positions at 32 px."""


class Training(Settings):
    """Everything that the trained weights depend on, beside the images and the architecture.

    The paper names the losses (MSE, LPIPS, adversarial), not their weights: all values here are our choice.
    """

    steps: int = Field(default=2500, ge=1)
    batch: int = Field(default=32, ge=1)
    """Images a step at the lowest resolution; fewer at higher ones, so that every step costs about the same."""
    resolutions: tuple[int, ...] = Field(default=(32, 32, 64), min_length=1)
    """Taken in turn; one that is named twice gets twice the steps."""
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    warmup: int = Field(default=100, ge=0)
    ema: float = Field(default=0.03, gt=0, le=0.25)
    """Width of the weights' average, relative to the steps so far of its part (`snapgen.training.Average`)."""
    latent_noise: float = Field(default=0.3, ge=0)
    """Largest standard deviation of the noise that the decoder must bear: a diffusion model's latents are not exact."""
    coarse: float = Field(default=1, ge=0)
    """Weight of the loss of decoding latents averaged 2×2 against images averaged so. It ties the latents' scales to
    the image's, which leaves less high-frequency energy for a diffusion model to learn."""
    l1: float = Field(default=0.5, ge=0)
    mse: float = Field(default=1, ge=0)
    perceptual: float = Field(default=0.3, ge=0)
    adversarial: float = Field(default=0.03, ge=0)
    adversarial_share: float = Field(default=0.25, ge=0, le=1)
    """The last share of the steps, in which the encoder is frozen and the discriminator plays."""
    seed: int = 0


class PatchDiscriminator(nn.Sequential):
    """Three convolutions that judge patches of 18 px: (B, 3, H, W) → (B, 1, H/4, W/4).

    All but the last are spectrally normalised: with few steps to play it must not run away from the decoder.
    """

    def __init__(self, width: int = 32) -> None:
        norm = nn.utils.parametrizations.spectral_norm
        super().__init__(
            norm(nn.Conv2d(3, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )


def train(
    model: ConvAutoencoder | TinyDecoder,
    images: Pixels,
    training: Training,
    *,
    encoder: Autoencoder | None = None,
    progress: Progress | None = None,
) -> None:
    """Trains ``model`` in place; it ends with the averaged weights and, an autoencoder, with its latents' statistics.

    The same arguments on the same machine with as many threads give the same weights.

    Args:
        encoder: frozen encoder whose latents a `TinyDecoder` learns to decode; None: the model is an autoencoder.
        progress: called after each step.
    """
    assert (encoder is None) == isinstance(model, ConvAutoencoder)
    missing = set(training.resolutions) - set(images)
    assert not missing, f"no images of {missing}"
    run = _Run(model, images, training, encoder)
    for step in range(training.steps):
        if step == run.frozen_from and isinstance(model, ConvAutoencoder):
            run.freeze_encoder(model, step)
        losses = run.step(step)
        if progress:
            progress(step + 1, training.steps, losses)
    model.load_state_dict(run.average.state())
    if run.frozen_from >= training.steps and isinstance(model, ConvAutoencoder):
        model.measure_latents(_sample(images, training))
    model.eval()


def initial(seed: int, **config: Any) -> ConvAutoencoder:
    """An untrained autoencoder; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "autoencoder", "weights"))
        return cast(ConvAutoencoder, ConvAutoencoder(**config))


def tiny_decoder_for(encoder: Autoencoder, *, seed: int) -> TinyDecoder:
    """An untrained decoder of the paper's size (for factor 8; as thin for others) for an encoder's latents."""
    levels = encoder.factor.bit_length()
    if levels > len(PAPER["widths"]) or levels < 2:
        raise InputError("--encoder", f"has a factor of {encoder.factor}", "give one of 2, 4 or 8")
    config = {**PAPER, "widths": PAPER["widths"][:levels], "blocks": PAPER["blocks"][:levels]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "autoencoder", "weights"))
        return cast(TinyDecoder, TinyDecoder(**config | {"latent_channels": encoder.latent_channels}))


@dataclass
class _Run:
    """The moving parts of one training."""

    model: ConvAutoencoder | TinyDecoder
    images: Pixels
    training: Training
    encoder: Autoencoder | None

    def __post_init__(self) -> None:
        training = self.training
        self.frozen_from = round(training.steps * (1 - training.adversarial_share))
        self.decoder = self.model.decoder if isinstance(self.model, ConvAutoencoder) else self.model
        self.average, self.averaged_from = Average(self.model, training.ema), 0
        self.perceptual = PerceptualLoss()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(training.seed, "autoencoder", "discriminator"))
            self.discriminator = PatchDiscriminator()
        self.optimizer = Optimizers(
            self.model,
            kind=training.optimizer,
            learning_rate=training.learning_rate,
            beta2=0.99,
            weight_decay=training.weight_decay,
            clip=1,
        )
        self.judge = torch.optim.AdamW(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def step(self, step: int) -> dict[str, float]:
        """One update of the model, and of the discriminator once it plays."""
        random = torch.Generator().manual_seed(seeds.derive(self.training.seed, "autoencoder", "step", step))
        target = _batch(self.images, self.training, step, random)
        latents = self.encode(target)
        reach = torch.rand(len(latents), 1, 1, 1, generator=random) * self.training.latent_noise
        noise = reach * torch.randn(latents.shape, generator=random)
        decoded = self.decoder(latents + noise)
        losses = self.reconstruction(decoded, target)
        if self.training.coarse and target.shape[-1] > min(self.training.resolutions):
            coarse = self.decoder(functional.avg_pool2d(latents, 2))
            again = self.reconstruction(coarse, functional.avg_pool2d(target, 2))
            losses["coarse"] = self.training.coarse * sum(again.values(), torch.zeros(()))
        if step >= self.frozen_from and self.training.adversarial:
            losses["adversarial"] = -self.training.adversarial * self.discriminator(decoded).mean()
        self.update(sum(losses.values(), torch.zeros(())), step)
        if "adversarial" in losses:
            losses["discriminator"] = self.discriminate(decoded.detach(), target)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def encode(self, target: Tensor) -> Tensor:
        if self.encoder is None:
            assert isinstance(self.model, ConvAutoencoder)
            latents: Tensor = self.model.encode_normalised_by_batch(target)
            return latents
        with torch.no_grad():
            return self.encoder.encode(target)

    def reconstruction(self, decoded: Tensor, target: Tensor) -> dict[str, Tensor]:
        training = self.training
        return {
            "l1": training.l1 * functional.l1_loss(decoded, target),
            "mse": training.mse * functional.mse_loss(decoded, target),
            "perceptual": training.perceptual * self.perceptual(decoded, target),
        }

    def update(self, loss: Tensor, step: int) -> None:
        torch.autograd.backward(loss)
        self.optimizer.step(_schedule(step, self.training))
        self.average.update(step + 1 - self.averaged_from)

    def discriminate(self, decoded: Tensor, target: Tensor) -> Tensor:
        """One update of the discriminator by the hinge loss."""
        real, fake = self.discriminator(target), self.discriminator(decoded)
        loss: Tensor = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
        self.judge.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.judge.step()
        return loss

    def freeze_encoder(self, model: ConvAutoencoder, step: int) -> None:
        """From here on the averaged encoder is the encoder, and the decoder sees latents as `encode` will give them."""
        model.load_state_dict(self.average.state())
        model.encoder.requires_grad_(False)
        model.measure_latents(_sample(self.images, self.training))
        self.average, self.averaged_from = Average(model, self.training.ema), step
        self.encoder = model


def _schedule(step: int, training: Training) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _batch(images: Pixels, training: Training, step: int, random: torch.Generator) -> Tensor:
    """The images of a step, mirrored and moved by chance: uint8 → [-1, 1]."""
    resolution = training.resolutions[step % len(training.resolutions)]
    lowest = min(training.resolutions)
    size = max(2, round(training.batch * (lowest / resolution) ** 2))
    pixels = images[resolution]
    batch = pixels[torch.randint(len(pixels), (size,), generator=random)]
    mirrored = torch.rand(size, 1, 1, 1, generator=random) < 0.5
    batch = torch.where(mirrored, batch.flip(-1), batch)
    reach = resolution // 16
    padded = functional.pad(as_float(batch), (reach,) * 4, mode="replicate")
    x, y = torch.randint(2 * reach + 1, (2,), generator=random).tolist()
    return padded[..., y : y + resolution, x : x + resolution]


def _sample(images: Pixels, training: Training) -> Iterator[Tensor]:
    """Batches of images spread over the set, enough of each resolution for statistics of two digits and more."""
    for resolution in sorted(set(training.resolutions)):
        pixels = images[resolution]
        for batch in torch.split(pixels[:: max(1, len(pixels) // MEASURED)], BATCH):
            yield as_float(batch)


def steps_for(
    minutes: float,
    model: ConvAutoencoder | TinyDecoder,
    images: Pixels,
    training: Training,
    *,
    encoder: Autoencoder | None = None,
) -> int:
    """Steps that fit into so many minutes here, from a few timed ones."""
    few = {side: pixels[:64] for side, pixels in images.items()}
    marks: list[float] = []
    train(
        copy.deepcopy(model),
        few,
        training.model_copy(update={"steps": 22}),
        encoder=encoder,
        progress=lambda *_: marks.append(time.perf_counter()),
    )
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

    Example: python -m snapgen.autoencoder_training --out runs/autoencoder --minutes 8
    """
    torch.set_num_threads(1)
    training = Training(resolutions=_sides(resolutions), seed=seed)
    given = load(encoder) if encoder else None
    images = {side: _pixels(data, "train", side) for side in sorted(set(training.resolutions))}
    model = tiny_decoder_for(given, seed=seed) if given else initial(seed)
    fitting = steps or steps_for(minutes, model, images, training, encoder=given)
    training = training.model_copy(update={"steps": fitting})
    if not quiet:
        typer.echo(f"{training!r} on {len(images[training.resolutions[0]])} images of {data}, one thread")
    started = time.process_time()
    with _telling(fitting, quiet=quiet) as progress:
        train(model, images, training, encoder=given, progress=progress)
    spent = (time.process_time() - started) / 60
    command = f"--steps {fitting} --data {data} --resolutions {resolutions} --seed {seed}"
    command += f" --encoder {encoder}" if encoder else ""
    with _aside(out) as folder:
        cast(Any, model).half().save_pretrained(folder)
        trained = WithDecoder(given, read_decoder(folder)) if given else load(folder)
        quality = {side: psnr(trained, _pixels(data, "val", side)) for side in images}
        (folder / "README.md").write_text(_card(trained, training, quality, command, spent))
    typer.echo(f"{out}: " + "; ".join(f"{side} px {value}" for side, value in quality.items()))


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` whose files take their places in it at the end."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        yield Path(folder)
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)


def _card(trained: Autoencoder, training: Training, quality: Mapping[int, Psnr], command: str, minutes: float) -> str:
    decoder = cast(nn.Module, trained.decoder)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    rows = "\n".join(f"| {side} px | {value} |" for side, value in quality.items())
    return f"""# {type(trained).__name__}: {trained.latent_channels} latent channels, factor {trained.factor}

Made by `python -m snapgen.autoencoder_training --out FOLDER {command}`
on {time.strftime("%Y-%m-%d")}: {minutes:.1f} minutes of one thread of {platform.processor() or platform.machine()},
torch {torch.__version__}. Weights in half precision; the decoder has {size:,} parameters.

| validation images | PSNR, with the 95 % interval of its mean |
|---|---|
{rows}

Settings: `{training.model_dump_json()}`
"""


@contextmanager
def _telling(steps: int, *, quiet: bool) -> Iterator[Progress | None]:
    """A bar with the time left on a terminal, plain lines elsewhere."""
    if quiet or not sys.stdout.isatty():
        yield None if quiet else _say
        return
    with rich.progress.Progress() as bar:
        task = bar.add_task("training", total=steps)
        yield lambda step, _steps, losses: bar.update(task, completed=step, description=f"loss {losses['mse']:.4f}")


def _say(step: int, steps: int, losses: Mapping[str, float]) -> None:
    if step % 100 == 0 or step == steps:
        typer.echo(f"step {step}/{steps}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def _sides(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
        raise InputError("--resolutions", f"{text!r} are no sides of images", "write e.g. 32,64 (16 or more each)")
    return tuple(int(part) for part in parts)


def _pixels(data: str, split: Literal["train", "val"], side: int) -> Tensor:
    return torch.cat(list(open_images(data, split=split, resolution=side).batches(256)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
