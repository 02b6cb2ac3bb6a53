"""Commands that make one net of another: convert, prune-decoder."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.output import print_json, print_table, progress_bar
from snapgen.errors import InputError

if TYPE_CHECKING:
    from snapgen.conversion.from_diffusers import Conversion

app = typer.Typer()


@app.command(epilog="Example: archsearch convert stable-diffusion-v1-5/stable-diffusion-v1-5 --out sd15")
def convert(
    source: Annotated[str, typer.Argument(help="A folder of diffusers' save_pretrained, or OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option(help="The folder to write: our U-Net's save_pretrained, in float32.")],
    prediction: Annotated[
        str | None, typer.Option(help="What it predicts (noise, v, velocity, …), if no scheduler beside it says so.")
    ] = None,
    time_ids: Annotated[
        str | None, typer.Option(help="Sizes to fold in where the net takes some (SDXL), e.g. 512,512,0,0,512,512.")
    ] = None,
    partial: Annotated[
        bool, typer.Option(help="Take what is the same from a net that differs; train the rest.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a diffusers U-Net (SD-1.5, SDXL, DreamLite) into ours, with the same outputs."""
    from snapgen.conversion.from_diffusers import from_diffusers
    from snapgen.io.atomic import atomic_folder, check_new_folder

    sizes = None if time_ids is None else _sizes(time_ids)
    check_new_folder(out)
    with progress_bar("converting", quiet=quiet or as_json) as progress:
        conversion = from_diffusers(source, prediction=prediction, time_ids=sizes, partial=partial, progress=progress)
    with atomic_folder(out) as folder:
        conversion.net.save_pretrained(folder)
    if as_json:
        print_json(
            {
                "architecture_id": conversion.net.arch.id,
                "params": conversion.net.num_parameters(),
                "left_out": conversion.dropped,
                "unused": conversion.unexpected_keys,
                "new": conversion.missing_keys,
                "prediction": conversion.prediction_source.prediction,
                "folder": str(out),
            }
        )
    else:
        _print(conversion, out)


def _print(conversion: Conversion, out: Path) -> None:
    rows = [("architecture", conversion.net.arch.id), ("params", f"{conversion.net.num_parameters() / 1e6:.3f} M")]
    rows += [("left out", phrase) for phrase in conversion.dropped]
    for what, names in (("no place for", conversion.unexpected_keys), ("begins anew", conversion.missing_keys)):
        if names:
            rows.append((what, f"{len(names)} weights, {names[0]} to {names[-1]}"))
    meaning = conversion.prediction_source
    if meaning.prediction is not None:
        rows.append(("predicts", f"{meaning.prediction} ({meaning.reason})"))
    print_table("", ("", ""), rows)
    if meaning.prediction is None:
        typer.echo(f"Not noted what it predicts: {meaning.reason}; convert it with --prediction before it teaches.")
    if conversion.net.needs_context:
        typer.echo('It was trained on encoded padding: give its text encoders padding: encoded and "null": encoded')
        typer.echo("(zeros for SDXL, whose pipeline takes zeros for an empty prompt).")
    typer.echo(f"U-Net: {out.resolve()}")


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(map(math.isfinite, sizes)):
        raise InputError("--time-ids", f"{text!r} is no list of numbers", "write e.g. 1024,1024,0,0,1024,1024")
    return sizes


@app.command(
    "prune-decoder",
    epilog="Example: archsearch prune-decoder stable-diffusion-v1-5/ --prompts prompts.txt --out small    Resumes.",
)
def prune_decoder(
    run: Annotated[
        str, typer.Argument(help="A run, or a folder of our pipeline or of diffusers' StableDiffusionPipeline.")
    ],
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt a line: what latents are drawn for.")],
    out: Annotated[Path, typer.Option(help="The folder to write: the pipeline with the smaller decoder.")],
    prune_ratio: Annotated[
        float, typer.Option(help="Share of the decoder's channels to cut; 0.5 is SnapFusion's.")
    ] = 0.5,
    num_latents: Annotated[int, typer.Option(help="Number of latents to draw; they are kept in the cache.")] = 1024,
    sampler_steps: Annotated[int | None, typer.Option(help="Of the sampler, if not the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the sampler, likewise.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels of a side, likewise.")] = None,
    steps: Annotated[int, typer.Option(help="Of the training.")] = 2000,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="The highest, after the warm-up.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cut an AutoencoderKL decoder's channels, and train it against the whole one on the pipeline's own latents."""
    from snapgen import config
    from snapgen.pipeline.decoder_distillation import DecoderDistillationConfig, distill
    from snapgen.pipeline.synthetic_latents import SamplingConfig

    sampled: dict[str, Any] = {
        "num_latents": num_latents,
        "num_inference_steps": sampler_steps,
        "guidance_scale": guidance,
        "resolution": resolution,
        "seed": seed,
    }
    trained = {
        "prune_ratio": prune_ratio,
        "steps": steps,
        "batch_size": batch,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    sampling = config.parse_config(sampled, SamplingConfig, source="options")
    training = config.parse_config(trained, DecoderDistillationConfig, source="options")
    with progress_bar("drawing latents", quiet=quiet or as_json) as progress:
        found = distill(run, prompts, out, sampling=sampling, training=training, progress=progress)
    if as_json:
        print_json({"folder": str(out), **asdict(found)})
        return
    times = found.whole_params / found.params
    rows = [
        (
            "decoder",
            f"{found.params / 1e6:.3f} M params, of {found.whole_params / 1e6:.3f} M ({times:.1f} times fewer)",
        ),
        ("as it was cut", f"{found.untrained}"),
        ("trained", f"{found.trained}"),
    ]
    print_table("Against the whole decoder, on latents held out", ("", ""), rows)
    typer.echo(f"Pipeline: {out.resolve()}")
