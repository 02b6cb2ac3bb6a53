"""Convert a U-Net, a tiny decoder or a text encoder to a Core ML package.

python -m snapgen.coreml.convert snapgen-t2i --latent 128 --out unet.mlpackage
python -m snapgen.coreml.convert runs/decoder --latent 128 --out decoder.mlpackage
python -m snapgen.coreml.convert minilm --tokens 16 --out text.mlpackage
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import rich.progress
import typer

from snapgen import config as settings
from snapgen.architecture import presets
from snapgen.conditioning import text_encoder
from snapgen.coreml import compatibility, mil
from snapgen.coreml import convert as coreml
from snapgen.coreml.package import PackageOptions
from snapgen.errors import InputError

if TYPE_CHECKING:
    from snapgen.autoencoders.tiny_decoder import TinyDecoder
    from snapgen.models.unet import UNet

PAPER_DECODER = "tiny-decoder"
"""The name of the tiny decoder of the published size, with random weights."""


def main(
    name: Annotated[
        str,
        typer.Argument(
            help="A preset, an architecture's JSON or YAML file, minilm, tiny-decoder, "
            "or the folder of a trained U-Net, a tiny decoder or a text encoder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The package to write, NAME.mlpackage.")],
    latent: Annotated[int, typer.Option(min=1, help="Height and width of the latent.")] = 128,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the context: 77, of a text encoder 16.")] = None,
    palette_bits: Annotated[
        int | None, typer.Option(help="Weights in palettes of so many bits: 1, 2, 3, 4, 6, 8.")
    ] = None,
    int8: Annotated[bool, typer.Option(help="Weights as 8-bit integers.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
) -> None:
    """Convert a net to a Core ML package, and say what of it would not run on the Neural Engine.

    Architectures get random weights. Works on Linux, too.
    """
    if out.suffix != ".mlpackage":
        raise InputError("--out", f"{out} is no package's name", "end it in .mlpackage")
    if out.exists() and not (out / "Manifest.json").is_file():
        raise InputError("--out", f"{out} exists and is no package", "name another")
    options = settings.parse_config({"palette_bits": palette_bits, "int8": int8}, PackageOptions, source="options")
    began = time.perf_counter()
    columns = (rich.progress.SpinnerColumn(), "converting {task.description}", rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, transient=True, disable=quiet or not sys.stdout.isatty()) as bar:
        bar.add_task(name, total=None)
        package = convert(name, latent, tokens, options)
        seconds = time.perf_counter() - began
        _place(package, out)
    program = mil.read_program(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if not quiet:
        typer.echo(
            f"{json.dumps(dict(program.counts().most_common()))}\n{json.dumps(dict(program.layouts().most_common()))}\n"
            f"converted in {seconds:.0f} s, with {peak / 1e9:.1f} GB of memory at most"
        )
    typer.echo(f"{out}: {size / 1e6:.1f} MB, {len(program.operations)} operations, {program.macs / 1e9:.3f} GMACs")
    found = compatibility.violations(program)
    typer.echo("\n".join(found) if found else "nothing in it is known to fall off the Neural Engine")


def convert(name: str, latent: int, tokens: int | None, options: PackageOptions) -> Path:
    """The package of whatever is called ``name``.

    Raises:
        InputError: if nothing is, or it does not convert.
    """
    folder = Path(name)
    kind = _class_name(folder)
    if name == PAPER_DECODER or kind == "TinyDecoder":
        return coreml.convert_decoder(_decoder(name), latent, options=options)
    if kind == "UNet":
        return coreml.convert_unet(_trained(folder), latent, context_tokens=tokens or 77, options=options)
    if name == text_encoder.MINILM or folder.is_dir():
        return coreml.convert_text(name, tokens or 16, options=options)
    return coreml.convert_unet(presets.resolve(name), latent, context_tokens=tokens or 77, options=options)


def _class_name(folder: Path) -> str:
    config = folder / "config.json"
    return str(settings.read_mapping(config).get("_class_name")) if folder.is_dir() and config.is_file() else ""


def _trained(folder: Path) -> UNet:
    from snapgen.models.unet import UNet

    try:
        net: UNet = UNet.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers, pydantic, safetensors and torch each raise kinds of their own
        text = " ".join(str(error).split())[:120]
        raise InputError(folder, f"cannot be read as a U-Net ({text})", "name a folder of save_pretrained") from None
    return net


def _decoder(name: str) -> TinyDecoder:
    import torch

    from snapgen.autoencoders.autoencoder import read_decoder
    from snapgen.autoencoders.tiny_decoder import PAPER, TinyDecoder

    if name != PAPER_DECODER:
        return read_decoder(Path(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast("TinyDecoder", TinyDecoder(**PAPER))


def _place(package: Path, out: Path) -> None:
    """A copy of the package, whole or not at all."""
    part = out.with_suffix(".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(package, part, dirs_exist_ok=True)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise InputError(out, (error.strerror or "cannot be written").lower(), "name another place") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
