"""The command that makes a pipeline's decoder smaller: prune-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.printing import bar, print_json, print_table
from snapgen import settings

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer()


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
    ratio: Annotated[float, typer.Option(help="Of the decoder's channels to cut; 0.5 is SnapFusion's.")] = 0.5,
    images: Annotated[int, typer.Option(help="Latents to draw; kept in the cache.")] = 1024,
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
    from snapgen.decoder_distillation import Distillation, distil
    from snapgen.synthetic import Sampling

    sampled: dict[str, Any] = {"images": images, "steps": sampler_steps, "guidance": guidance, "resolution": resolution}
    sampling = settings.parse({**sampled, "seed": seed}, Sampling, source="options")
    trained = {"ratio": ratio, "steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    training = settings.parse(trained, Distillation, source="options")
    with bar("drawing latents", quiet=quiet or as_json) as tell:

        def progress(step: int, steps: int, _losses: Mapping[str, Tensor]) -> None:
            tell(step / steps, f"training, step {step} of {steps}")

        found = distil(run, prompts, out, sampling=sampling, training=training, progress=progress)
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
