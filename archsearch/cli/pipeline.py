"""The commands on trained runs: generate, export."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archsearch.cli.options import ARCHITECTURE, Json, Quiet
from archsearch.cli.output import check_out, print_json, print_table, progress_bar
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write, write_errors

if TYPE_CHECKING:
    from torch import Tensor

    from snapgen.architecture.latent_size import LatentSize
    from snapgen.architecture.schema import Architecture
    from snapgen.coreml.package import PackageOptions, PackageSummary, Target
    from snapgen.models.unet import UNet
    from snapgen.pipeline.snapgen_pipeline import SnapGenPipeline

app = typer.Typer()

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Run = Annotated[
    str,
    typer.Argument(
        help="A run's folder or name under runs/, a pipeline's folder, or a candidate (STUDY:best, STUDY:TRIAL)."
    ),
]


class To(StrEnum):
    """Format that a pipeline is exported to."""

    COREML = "coreml"
    COREAI = "coreai"


class Overflow(StrEnum):
    """Answers to activations that float16 cannot represent."""

    REFUSE = "refuse"
    FLOAT32 = "float32"
    IGNORE = "ignore"


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


WhatToExport = Annotated[
    str,
    typer.Argument(
        help="A run or a pipeline's folder; or one net: the folder of a U-Net, a tiny decoder or a text encoder, "
        f"minilm, tiny-decoder, or an architecture. {ARCHITECTURE}."
    ),
]
ExportOut = Annotated[
    Path | None,
    typer.Option(help="The folder to write, else one beside the pipeline; of one net NAME.mlpackage, .aimodel."),
]
Latent = Annotated[
    str | None,
    typer.Option(
        "--latent",
        "--latent-size",
        help="Latent, WIDTHxHEIGHT or one side; default: the run's or the study's own, else 128.",
    ),
]
ExportTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Length of one net's context; default: the study's own, else 77, of a text encoder 16."),
]
OnOverflow = Annotated[
    Overflow, typer.Option(help="What to do with a component of a run whose activations overflow float16.")
]
Prompts = Annotated[Path | None, typer.Option(help="Captions to draw in float16 before a run is exported, one a line.")]


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


@app.command(epilog="Example: archsearch export snapgen-t2i --to coreai --out unet.aimodel --latent 96x64")
def export(
    what: WhatToExport,
    to: Annotated[To, typer.Option(help="The format.")],
    out: ExportOut = None,
    latent: Latent = None,
    context_tokens: ExportTokens = None,
    palette_bits: Annotated[
        int | None, typer.Option(help="Weights in palettes of so many bits: 1, 2, 3, 4, 6, 8.")
    ] = None,
    int8: Annotated[bool, typer.Option(help="Weights as 8-bit integers.")] = False,
    overflow: OnOverflow = Overflow.REFUSE,
    prompts: Prompts = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a trained run into packages with a JSON file that says how to run them, or one net into one package.

    A study's candidate (STUDY:best) has its trained weights, another architecture random ones. Works on Linux.
    What a phone does with the packages has not been run.
    """
    from snapgen import config
    from snapgen.coreml.package import PackageOptions
    from snapgen.pipeline.loading import is_run

    options = config.parse_config({"palette_bits": palette_bits, "int8": int8}, PackageOptions, source="options")
    target, latent_size = _target(to), _latent(latent)
    target.versions()  # raises where what converts is missing
    if is_run(what):
        if context_tokens is not None:
            raise InputError("--context-tokens", f"{what} is a run, which has its own", "leave it out")
        wanted: dict[str, Any] = {"latent_size": latent_size, "options": options, "overflow": overflow.value}
        _export_run(what, out, target, prompts, wanted, as_json=as_json, quiet=quiet)
        return
    out = out or Path(f"{Path(what).stem.replace(':', '-')}{target.suffix}")
    with progress_bar(f"converting {what}", quiet=quiet or as_json):
        _export_net(what, out, latent_size, context_tokens, options, target)
    summary = target.summarize(out)
    if as_json:
        print_json({"package": str(out), **asdict(summary)})
        return
    _print_packages([summary], target, quiet=quiet)
    typer.echo(f"\nPackage: {out.resolve()}")


def _export_run(
    run: str,
    out: Path | None,
    target: Target,
    prompts: Path | None,
    wanted: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from snapgen.coreml.pipeline_export import DESCRIPTION, export_pipeline
    from snapgen.pipeline.decoder_distillation import read_prompts
    from snapgen.pipeline.loading import find_pipeline

    folder = find_pipeline(run)
    out = out or folder.parent / target.name
    captions = read_prompts(prompts) if prompts else None
    with progress_bar("reading", quiet=quiet or as_json) as progress:
        described = export_pipeline(folder, out, target=target, prompts=captions, progress=progress, **wanted)
    if as_json:
        print_json({"folder": str(out), **described})
        return
    packages = sorted(out.glob(f"*{target.suffix}"))
    _print_packages([target.summarize(package) for package in packages], target, quiet=quiet)
    for told in (described["unet"], described["decoder"], *described["text_encoders"]):
        if peak := told.get("largest_activation"):
            value = "over 65,504" if peak["overflows"] else f"{peak['value']:.4g}"
            typer.echo(f"{told['package']}: largest activation {value} in {peak['layer']}, {told['precision']}")
    typer.echo(f"\nHow to run them: {(out / DESCRIPTION).resolve()}")


@app.command(epilog="Example: archsearch push demo me/demo --dry-run")
def push(
    run: Run,
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Put it over a model of that name.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Add the pipeline",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and send nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Put a trained run's pipeline on the hub, with its model card; private unless it is to be public."""
    from snapgen.io.hub import check_hub_name, push_folder
    from snapgen.pipeline.card import CARD, write_card
    from snapgen.pipeline.loading import find_pipeline, load_pipeline

    check_hub_name(name)
    folder = find_pipeline(run)
    pipeline = load_pipeline(folder)  # raises for a damaged one
    if not (folder / CARD).is_file():
        write_card(folder, pipeline)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if dry_run:
        rows = [(str(file.relative_to(folder)), f"{file.stat().st_size / 1e6:.3f}") for file in files]
        print_table(f"{name}, {'public' if public else 'private'}", ("", "MB"), rows)
        return
    typer.echo(push_folder(folder, name, public=public, update=update, message=message))
    if "FILL IN" in (folder / CARD).read_text(encoding="utf-8") and not quiet:
        typer.echo(f"{folder / CARD}: what is marked FILL IN is still to be written", err=True)


def _target(to: To) -> Target:
    if to == To.COREAI:
        from snapgen.coreai import COREAI

        return COREAI
    from snapgen.coreml.convert import COREML

    return COREML


def _export_net(
    what: str,
    out: Path,
    latent: LatentSize | None,
    context_tokens: int | None,
    options: PackageOptions,
    target: Target,
) -> None:
    """Convert one net; a study's candidate at the sizes of the study where none are given."""
    from archsearch.studies.lookup import find_conditions
    from snapgen.coreml.net_export import LATENT_SIZE, export_net

    net = _net(what)
    if not isinstance(net, str):
        own = find_conditions(what).with_overrides(context_tokens=context_tokens)
        latent, context_tokens = latent or own.latent_size, own.context_tokens
    export_net(
        net, out, latent_size=latent or LATENT_SIZE, context_tokens=context_tokens, options=options, target=target
    )


def _net(name: str) -> str | Architecture | UNet:
    """A net's own name, where `export_net` finds it by that, the trained net of a candidate, or an architecture."""
    from archsearch.studies.lookup import find_architecture, find_candidate, is_candidate
    from snapgen.architecture.presets import TINY_DECODER
    from snapgen.conditioning.text_encoder import MINILM

    nets = (TINY_DECODER, MINILM)
    if name in nets or Path(name).is_dir():
        return name
    if is_candidate(name):
        from archsearch.studies.search import weights

        study, candidate = find_candidate(name)
        if weights.has_weights(study, candidate):
            return weights.load_unet(study, candidate)
        typer.echo(f"{name} itself was not trained, so its weights are random", err=True)
    return find_architecture(name, other_names=(*nets, "a run's name"))


def _print_packages(packages: Sequence[PackageSummary], target: Target, *, quiet: bool) -> None:
    rows = [
        (
            p.name,
            f"{p.size_bytes / 1e6:.1f}",
            f"{p.resident_bytes / 1e6:.1f}",
            f"{p.operations:,}",
            f"{p.macs / 1e9:.3f}",
        )
        for p in packages
    ]
    print_table("", ("", "MB", "MB in memory", "operations", "GMACs"), rows)
    for p in packages if not quiet else ():
        kinds = ", ".join(f"{kind} {count}" for kind, count in p.operation_counts.items())
        apart = ", ".join(f"{name} {count}" for name, count in p.decomposed.items())
        typer.echo(f"\n{p.name}: {kinds}" + (f"\nTaken apart: {apart}" if apart else ""))
    violations = [f"{p.name}: {line}" for p in packages for line in p.violations]
    if violations and not quiet:
        typer.echo(f"\n{target.limits}:\n" + "\n".join(violations))
    if not violations:
        typer.echo(f"\n{target.limits}: nothing.")


def _sides(size: str | None, option: str = "--size") -> tuple[int | None, int | None]:
    """Width and height."""
    if size is None:
        return None, None
    sides = size.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise InputError(option, f"{size!r} is no size", "write e.g. 64 or 64x96")
    return int(sides[0]), int(sides[-1])


def _latent(size: str | None) -> LatentSize | None:
    width, height = _sides(size, "--latent")
    return (height, width) if width and height and width != height else height


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
