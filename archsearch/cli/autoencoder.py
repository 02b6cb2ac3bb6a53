"""The command train-autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from archsearch.cli.options import Quiet
from archsearch.cli.output import progress_bar
from snapgen.errors import InputError

app = typer.Typer()


@app.command("train-autoencoder", epilog="Example: archsearch train-autoencoder --out runs/autoencoder    Resumes.")
def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder that gets the weights, their configuration and a README.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train; sets the steps by a few timed ones.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train, whatever time they take.")] = None,
    data: Annotated[str, typer.Option(help="emoji, a folder of images or webdataset shards.")] = "emoji",
    resolutions: Annotated[str, typer.Option(help="Sides of the images in pixels, taken in turn.")] = "32,32,64",
    encoder: Annotated[str | None, typer.Option(help="Train a tiny decoder for this autoencoder's encoder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train the small autoencoder, or a tiny decoder for an encoder that is given, on one thread."""
    sides = _sides(resolutions)
    from snapgen.autoencoders.train_to_folder import train_to_folder

    log: Callable[[str], None] = (lambda _: None) if quiet else typer.echo
    with progress_bar("training", quiet=quiet) as progress:
        quality = train_to_folder(
            out,
            minutes=minutes,
            steps=steps,
            data=data,
            resolutions=sides,
            encoder=encoder,
            seed=seed,
            progress=progress,
            log=log,
        )
    typer.echo(f"{out}: " + "; ".join(f"{side} px {value}" for side, value in quality.items()))


def _sides(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
        raise InputError("--resolutions", f"{text!r} are not sides of images", "write e.g. 32,64 (16 or more each)")
    return tuple(int(part) for part in parts)
