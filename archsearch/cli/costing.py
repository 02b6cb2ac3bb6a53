"""The command that counts: cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import Json
from archsearch.cli.printing import cost_cells, print_json, print_table
from snapgen import presets
from snapgen.presets import TINY_DECODER

if TYPE_CHECKING:
    from archsearch.breakdown import Breakdown
    from archsearch.cost import Part

LARGEST_LATENT = 4096
LONGEST_CONTEXT = 65536

app = typer.Typer()


@app.command(epilog="Example: archsearch cost snapgen-imagenet --latent 32 --json")
def cost(
    name: Annotated[str, typer.Argument(help="A preset, a JSON or YAML file of an architecture, or tiny-decoder.")],
    latent: Annotated[int, typer.Option(min=1, max=LARGEST_LATENT, help="Height and width of the latent.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, max=LONGEST_CONTEXT, help="Length of the context.")] = 77,
    as_json: Json = False,
) -> None:
    """Count params, MACs and activation memory, by stage and by kind of block; no weights are made."""
    found, about = _counted(name, latent, tokens)
    if as_json:
        print_json({"name": name, **about, **found.model_dump(mode="json")})
        return
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())
    header = ("", "params M", "%", "MACs G", "%", "peak MB", "written MB")
    typer.echo(f"{name}: {said}\n")
    print_table("", header, [_row("total", found.total, found.total)])
    for title, parts in (("By stage", found.by_stage), ("By kind of block", found.by_kind)):
        rows = [_row(part.replace("_", " "), numbers, found.total) for part, numbers in parts.items()]
        print_table(f"\n{title}", header, rows)
    typer.echo(f"\nMACs by operator: {_shares(found.macs_by_operator)}")
    typer.echo("Activations in fp16 at batch 1. peak: all that was live while the part ran; written: all it wrote.")


def _counted(name: str, latent: int, tokens: int) -> tuple[Breakdown, dict[str, str | int]]:
    """The breakdown, and what it was counted of.

    Raises:
        InputError: for an unknown name, a bad file, or a latent that does not fit.
    """
    from archsearch.breakdown import breakdown, decoder_breakdown
    from snapgen.tiny_decoder import PAPER

    if name == TINY_DECODER:
        return decoder_breakdown(PAPER, latent), {"latent": latent, "image": latent * 2 ** (len(PAPER["widths"]) - 1)}
    arch = presets.resolve(name, besides=(TINY_DECODER,))
    arch.check_latent(latent, source="--latent")
    about: dict[str, str | int] = {"architecture_id": arch.id, "latent": latent, "context_tokens": tokens}
    return breakdown(arch, latent, context_tokens=tokens), about


def _row(name: str, part: Part, total: Part) -> tuple[str, ...]:
    params, macs, peak = cost_cells(part)
    written = f"{part.written_bytes / 1e6:.1f}"
    return name, params, _percent(part.params, total.params), macs, _percent(part.macs, total.macs), peak, written


def _shares(macs: Mapping[str, int]) -> str:
    whole = sum(macs.values())
    return ", ".join(f"{operator} {value / 1e9:.3f} G ({_percent(value, whole)} %)" for operator, value in macs.items())


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"
