"""The commands on trained runs: generate, export."""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.output import bar, print_json, print_table
from snapgen import config
from snapgen.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer()

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Run = Annotated[str, typer.Argument(help="A run's folder, its name under runs/, or a pipeline's folder.")]


class Target(StrEnum):
    """What a pipeline is exported to."""

    COREML = "coreml"


@app.command(epilog='Example: archsearch generate demo "a red apple" "a blue car" --steps 4 --out both.png')
def generate(
    run: Run,
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several make a grid.")],
    out: Annotated[Path, typer.Option(help="The image to write: .png, .jpg or .webp.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler, if not the run's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, if not the run's own; 1: none.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    images: Annotated[int, typer.Option(min=1, help="Images of each prompt; of several prompts a row each.")] = 1,
    size: Annotated[str | None, typer.Option(help="Pixels, WIDTHxHEIGHT or one side, if not the run's own.")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw prompts with a trained run."""
    width, height = _sides(size)
    _prepare(out)
    from snapgen import devices
    from snapgen.pipeline.loading import load_pipeline

    pipeline = load_pipeline(run).to(devices.default_device())
    pipeline.set_progress_bar_config(disable=quiet or not sys.stderr.isatty(), desc="drawing", leave=False)
    drawn: Tensor = pipeline(
        prompts,
        num_images_per_prompt=images,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        seed=seed,
        output_type="pt",
    ).images
    rowed = len(prompts) > 1 and images > 1
    _write(drawn, images if rowed else math.ceil(math.sqrt(len(drawn))), out)
    if not quiet:
        typer.echo(f"{out}: {len(drawn)} of {drawn.shape[3]}×{drawn.shape[2]} pixels")


@app.command(epilog="Example: archsearch export demo --to coreml --out demo-coreml")
def export(
    run: Run,
    to: Annotated[Target, typer.Option(help="The format.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; else coreml/ beside the pipeline.")] = None,
    latent: Annotated[int | None, typer.Option(min=1, help="Side of the latent, if not the run's own.")] = None,
    palette_bits: Annotated[
        int | None, typer.Option(help="Weights in palettes of so many bits: 1, 2, 3, 4, 6, 8.")
    ] = None,
    int8: Annotated[bool, typer.Option(help="Weights as 8-bit integers.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a trained run into Core ML packages and a JSON file that says how to run them.

    Works on Linux. What a phone does with the packages has not been run.
    """
    from snapgen.coreml import compatibility, mil
    from snapgen.coreml.package import PackageOptions
    from snapgen.coreml.pipeline_export import DESCRIPTION, export_pipeline
    from snapgen.pipeline.loading import find_pipeline

    options = config.parse_config({"palette_bits": palette_bits, "int8": int8}, PackageOptions, source="options")
    folder = find_pipeline(run)
    out = out or folder.parent / to
    with bar("reading", quiet=quiet or as_json) as tell:
        described = export_pipeline(folder, out, latent_size=latent, options=options, progress=tell)
    if as_json:
        print_json({"folder": str(out), **described})
        return
    rows, told = [], []
    for package in sorted(out.glob("*.mlpackage")):
        program = mil.read_program(package)
        size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        rows.append((package.name, f"{size / 1e6:.1f}", str(len(program.operations)), f"{program.macs / 1e9:.3f}"))
        told += [f"{package.name}: {line}" for line in compatibility.violations(program)]
    print_table("", ("", "MB", "operations", "GMACs"), rows)
    if told and not quiet:
        typer.echo("\nKnown to fall off the Neural Engine:\n" + "\n".join(told))
    typer.echo(f"\nhow to run them: {(out / DESCRIPTION).resolve()}")


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    if size is None:
        return None, None
    sides = size.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InputError("--size", f"{size!r} is no size", "write e.g. 64 or 64x96")
    return int(sides[0]), int(sides[-1])


def _prepare(out: Path) -> None:
    """Refuses what cannot be written before anything is drawn."""
    if out.suffix.lower() not in SUFFIXES:
        raise InputError("--out", f"{out} is no image's name", f"end it in one of: {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise InputError("--out", f"{out} is a folder", "name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(out, (error.strerror or "cannot be written").lower(), "name another file") from None


def _write(images: Tensor, columns: int, out: Path) -> None:
    """Images (N, 3, H, W) in [0, 1] as a grid."""
    import torch
    from PIL import Image

    from snapgen.data.pixels import grid
    from snapgen.io.atomic import atomic_write

    pixels = (images.cpu() * 255).round().to(torch.uint8)
    sheet = Image.fromarray(grid(pixels, -(-len(pixels) // columns), columns).permute(1, 2, 0).numpy())
    form = Image.registered_extensions()[out.suffix.lower()]
    try:
        with atomic_write(out) as part:
            sheet.save(part, format=form)
    except OSError as error:
        raise InputError(out, (error.strerror or "cannot be written").lower(), "name another file") from None
