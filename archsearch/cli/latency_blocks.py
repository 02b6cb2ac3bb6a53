"""The command latency blocks: what each block of a net costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archsearch.cli.latency import told_in_a_line
from archsearch.cli.options import ARCHITECTURE, ContextTokens, Device, Json, LatentSize, Quiet
from archsearch.cli.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from archsearch.block_latency.table import BlockTable, PredictionErrors

app = typer.Typer()


@app.command(epilog="Example: archsearch latency blocks emoji/base --latent-size 8 --out table.json    Resumes.")
def blocks(
    net: Annotated[str, typer.Argument(help=f"{ARCHITECTURE}.")],
    out: Annotated[Path, typer.Option(help="The table, .json; its raw records go beside it as they come, .jsonl.")],
    device: Device = None,
    latent_size: LatentSize = None,
    context_tokens: ContextTokens = None,
    validation_nets: Annotated[
        int, typer.Option(min=0, max=1000, help="Number of random sub-networks that sums are validated against.")
    ] = 20,
    extra_copies: Annotated[
        int, typer.Option(min=1, max=16, help="Copies added to a block to measure what one more costs.")
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random sub-networks.")] = 0,
    min_repeats: Annotated[int, typer.Option(min=1, max=100, help="Measure each net at least so often.")] = 3,
    max_repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Until its two lowest agree, but at most so often.")
    ] = 8,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each block of a net costs in milliseconds, and how well sums of blocks predict sub-networks."""
    from archsearch.block_latency import fitting
    from archsearch.block_latency.config import BlockTableConfig
    from archsearch.latency.records import SampleFile, ensure_writable
    from archsearch.studies.lookup import find_architecture, find_conditions
    from snapgen.errors import InputError
    from snapgen.io.atomic import atomic_write_text

    if out.suffix != ".json" or out.is_dir():
        raise InputError(out, "is no .json file", "name one, e.g. table.json")
    conditions = find_conditions(net).with_overrides(
        latent_size=latent_size, context_tokens=context_tokens, device=device
    )
    latent, tokens = conditions.latent_size, conditions.context_tokens
    arch, timer, raw = find_architecture(net), conditions.backend(), out.with_suffix(".jsonl")
    arch.validate_latent_size(latent, source="--latent-size")
    options = BlockTableConfig(
        extra_copies=extra_copies,
        validation_nets=validation_nets,
        seed=seed,
        min_repeats=min_repeats,
        max_repeats=max_repeats,
    )
    ensure_writable(raw)
    file = SampleFile(raw, latent, tokens)
    with progress_bar("measuring", quiet=quiet) as progress, told_in_a_line(conditions.device):
        table = fitting.fit_block_table(
            timer, arch, latent, tokens, options, existing=file.records(), save=file.append, progress=progress
        )
    atomic_write_text(out, table.to_json())
    if as_json:
        print_json(_as_json(table))
        return
    _print(net, table, markdown=markdown)
    typer.echo(f"Table: {out}")


def _print(net: str, table: BlockTable, *, markdown: bool) -> None:
    conditions = f"{table.source}, {table.device}, {table.chip}, {table.compute_units}, {table.runtime}"
    where = f"latent {table.latent_size}, {table.context_tokens} tokens"
    typer.echo(f"{net}: {table.whole_ms:.4g} ms, {where}; {conditions}\n")
    _show(("block", "ms", "share", "a copy more, ms"), _rows(table), markdown=markdown)
    if table.before is None:
        return
    typer.echo(f"\nSums of blocks held to the times of {len(table.before.errors)} random sub-networks\n")
    header = ("", "median error", "largest", "mean, signed", "within ±10 %")
    checks = [_check_row("sums as filled, without them", table.before)]
    checks += [_check_row(f"{name}, each left out in turn", check) for name, check in table.tried.items()]
    _show(header, checks, markdown=markdown)
    typer.echo(f"\n{_verdict(table)}")


def _rows(table: BlockTable) -> list[tuple[str, ...]]:
    from snapgen.architecture import block_index

    whole = table.predict(table.architecture)
    copy_ms = {cost.block_site: cost.copy_ms for cost in table.costs}
    rows = [("without any block", f"{table.fixed_ms:.3g}", f"{table.fixed_ms / whole:.1%}", "")]
    for block in block_index.blocks(table.architecture):
        ms = table.block_ms(block)
        less = "≤ " if ms == table.floor_ms else ""
        copy = "" if block.index else f"{copy_ms[block.block_site]:.3g}"
        rows.append((block.label, f"{less}{ms:.3g}", f"{less}{ms / whole:.1%}", copy))
    return [*rows, ("sum", f"{whole:.3g}", "100.0%", "")]


def _check_row(name: str, check: PredictionErrors) -> tuple[str, ...]:
    return name, f"{check.median:.1%}", f"{check.largest:.1%}", f"{check.bias:+.1%}", f"{check.within:.0%}"


def _verdict(table: BlockTable) -> str:
    assert table.before is not None
    if table.before.within == 1:
        return "None is off by more than 10 %: the costs stand as filled."
    if table.correction is None:
        return "Some are off by more than 10 %, and a refit does no better: the costs stand as filled."
    return "Some were off by more than 10 %: the costs above are fitted to the sub-networks too."


def _show(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, markdown: bool) -> None:
    from archsearch.reports.rendering import tables

    if markdown:
        typer.echo(tables.markdown(header, rows), nl=False)
    else:
        print_table("", header, rows)


def _as_json(table: BlockTable) -> dict[str, Any]:
    """The table, with what is worked out of it."""
    from snapgen.architecture import block_index

    checks = [("before", table.before), *table.tried.items()]
    figures = ("median", "largest", "bias", "within")
    return {
        **table.model_dump(mode="json", exclude_none=True),
        "whole_ms": table.whole_ms,
        "floor_ms": table.floor_ms,
        "blocks": {block.label: table.block_ms(block) for block in block_index.blocks(table.architecture)},
        "checks": {n: {f: getattr(check, f) for f in figures} for n, check in checks if check},
    }
