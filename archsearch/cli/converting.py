"""The command on checkpoints of others: convert."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.printing import bar, print_json, print_table
from snapgen.errors import InputError

if TYPE_CHECKING:
    from snapgen.conversion import Conversion

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
    from snapgen import meaning
    from snapgen.conversion import from_diffusers
    from snapgen.files import folder_aside

    sizes = None if time_ids is None else _sizes(time_ids)
    with folder_aside(out) as folder:
        with bar("converting", quiet=quiet or as_json) as tell:
            conversion = from_diffusers(source, prediction=prediction, time_ids=sizes, partial=partial, progress=tell)
        conversion.net.save_pretrained(folder)
        if conversion.meaning.prediction is not None:
            meaning.write(folder, conversion.meaning.prediction)
    if as_json:
        print_json(
            {
                "architecture_id": conversion.net.arch.id,
                "params": _params(conversion),
                "left_out": conversion.left_out,
                "unused": conversion.unused,
                "new": conversion.new,
                "prediction": conversion.meaning.prediction,
                "folder": str(out),
            }
        )
    else:
        _print(conversion, out)


def _print(conversion: Conversion, out: Path) -> None:
    rows = [("architecture", conversion.net.arch.id), ("params", f"{_params(conversion) / 1e6:.3f} M")]
    rows += [("left out", phrase) for phrase in conversion.left_out]
    for what, names in (("no place for", conversion.unused), ("begins anew", conversion.new)):
        if names:
            rows.append((what, f"{len(names)} weights, {names[0]} to {names[-1]}"))
    meaning = conversion.meaning
    if meaning.prediction is not None:
        rows.append(("predicts", f"{meaning.prediction} ({meaning.reason})"))
    print_table("", ("", ""), rows)
    if meaning.prediction is None:
        typer.echo(f"Not noted what it predicts: {meaning.reason}; convert it with --prediction before it teaches.")
    typer.echo(f"U-Net: {out.resolve()}")


def _params(conversion: Conversion) -> int:
    return sum(parameter.numel() for parameter in conversion.net.parameters())


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(map(math.isfinite, sizes)):
        raise InputError("--time-ids", f"{text!r} is no list of numbers", "write e.g. 1024,1024,0,0,1024,1024")
    return sizes
