"""The commands on trained runs: generate, export."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import ARCHITECTURE, Json, Quiet
from archsearch.cli.output import check_out, print_json, print_table, progress_bar
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write, write_errors

if TYPE_CHECKING:
    from torch import Tensor

    from snapgen.architecture.schema import Architecture
    from snapgen.coreml.compatibility import PackageSummary
    from snapgen.coreml.package import PackageOptions
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline

app = typer.Typer()

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Run = Annotated[
    str,
    typer.Argument(
        help="A run's folder or name under runs/, a pipeline's folder, or a candidate (STUDY:best, STUDY:TRIAL)."
    ),
]


class Target(StrEnum):
    """Format that a pipeline is exported to."""

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
    """Draw prompts with a trained run, or with a candidate of a study."""
    width, height = _sides(size)
    check_out(out, *SUFFIXES)
    from snapgen import devices

    pipeline = _pipeline(run).to(devices.default_device())
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


def _pipeline(name: str) -> SnapGenPipeline:
    """The pipeline of a run, or one around the trained network of a study's candidate."""
    from archsearch import library
    from snapgen.pipeline import loading

    if (library.RUNS / name / "study.db").is_file():
        raise InputError(name, "is a study, which has many nets", f"name a candidate: {name}:best or {name}:TRIAL")
    if ":" not in name or loading.is_run(name):
        return loading.load_pipeline(name)
    from archsearch.studies.lookup import find_candidate
    from archsearch.studies.search import weights

    return weights.load_pipeline(*find_candidate(name))


@app.command(epilog="Example: archsearch export snapgen-t2i --to coreml --out unet.mlpackage --latent-size 128")
def export(
    what: Annotated[
        str,
        typer.Argument(
            help="A run or a pipeline's folder; or one net: the folder of a U-Net, a tiny decoder or a text encoder, "
            f"minilm, tiny-decoder, or an architecture. {ARCHITECTURE}."
        ),
    ],
    to: Annotated[Target, typer.Option(help="The format.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write, else coreml/ beside the pipeline; of one net NAME.mlpackage."),
    ] = None,
    latent_size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width of the latent; default: the run's or the study's own, else 128."),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of one net's context; default: the study's own, else 77, of a text encoder 16."
        ),
    ] = None,
    palette_bits: Annotated[
        int | None, typer.Option(help="Weights in palettes of so many bits: 1, 2, 3, 4, 6, 8.")
    ] = None,
    int8: Annotated[bool, typer.Option(help="Weights as 8-bit integers.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a trained run into Core ML packages with a JSON file that says how to run them, or one net into one package.

    An architecture gets random weights. Works on Linux. What a phone does with the packages has not been run.
    """
    from snapgen import config
    from snapgen.coreml.compatibility import summarize_package
    from snapgen.coreml.package import PackageOptions
    from snapgen.coreml.pipeline_export import DESCRIPTION, export_pipeline
    from snapgen.pipeline.loading import find_pipeline, is_run

    options = config.parse_config({"palette_bits": palette_bits, "int8": int8}, PackageOptions, source="options")
    if not is_run(what):
        out = out or Path(f"{Path(what).stem.replace(':', '-')}.mlpackage")
        with progress_bar(f"converting {what}", quiet=quiet or as_json):
            _export_net(what, out, latent_size, context_tokens, options)
        _print_package(summarize_package(out), out, as_json=as_json, quiet=quiet)
        return
    if context_tokens is not None:
        raise InputError("--context-tokens", f"{what} is a run, which has its own", "leave it out")
    folder = find_pipeline(what)
    out = out or folder.parent / to
    with progress_bar("reading", quiet=quiet or as_json) as progress:
        described = export_pipeline(folder, out, latent_size=latent_size, options=options, progress=progress)
    if as_json:
        print_json({"folder": str(out), **described})
        return
    _print_packages([summarize_package(package) for package in sorted(out.glob("*.mlpackage"))], quiet=quiet)
    typer.echo(f"\nHow to run them: {(out / DESCRIPTION).resolve()}")


def _export_net(
    what: str, out: Path, latent_size: int | None, context_tokens: int | None, options: PackageOptions
) -> None:
    """Convert one net; a study's candidate at the sizes of the study where none are given."""
    from archsearch.studies.lookup import find_conditions
    from snapgen.coreml.net_export import LATENT_SIZE, export_net

    net = _net(what)
    if not isinstance(net, str):
        own = find_conditions(what).with_overrides(latent_size=latent_size, context_tokens=context_tokens)
        latent_size, context_tokens = own.latent_size, own.context_tokens
    export_net(net, out, latent_size=latent_size or LATENT_SIZE, context_tokens=context_tokens, options=options)


def _net(name: str) -> str | Architecture:
    """A net's own name, where `export_net` finds it by that, or an architecture."""
    from archsearch.studies.lookup import find_architecture
    from snapgen.architecture.presets import TINY_DECODER
    from snapgen.conditioning.text_encoder import MINILM

    nets = (TINY_DECODER, MINILM)
    return name if name in nets or Path(name).is_dir() else find_architecture(name, other_names=(*nets, "a run's name"))


def _print_package(summary: PackageSummary, out: Path, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json({"package": str(out), **asdict(summary)})
        return
    _print_packages([summary], quiet=quiet)
    typer.echo(f"\nPackage: {out.resolve()}")


def _print_packages(packages: Sequence[PackageSummary], *, quiet: bool) -> None:
    rows = [(p.name, f"{p.size_bytes / 1e6:.1f}", f"{p.operations:,}", f"{p.macs / 1e9:.3f}") for p in packages]
    print_table("", ("", "MB", "operations", "GMACs"), rows)
    violations = [f"{p.name}: {line}" for p in packages for line in p.violations]
    if violations and not quiet:
        typer.echo("\nKnown to fall off the Neural Engine:\n" + "\n".join(violations))
    if not violations:
        typer.echo("\nNothing is known to fall off the Neural Engine.")


def _sides(size: str | None) -> tuple[int | None, int | None]:
    """Width and height."""
    if size is None:
        return None, None
    sides = size.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise InputError("--size", f"{size!r} is no size", "write e.g. 64 or 64x96")
    return int(sides[0]), int(sides[-1])


def _write(images: Tensor, columns: int, out: Path) -> None:
    """Images (N, 3, H, W) in [0, 1] as a grid."""
    import torch
    from PIL import Image

    from snapgen.data.pixels import grid

    pixels = (images.cpu() * 255).round().to(torch.uint8)
    sheet = Image.fromarray(grid(pixels, -(-len(pixels) // columns), columns).permute(1, 2, 0).numpy())
    form = Image.registered_extensions()[out.suffix.lower()]
    with write_errors(out, "name another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as part:
            sheet.save(part, format=form)
