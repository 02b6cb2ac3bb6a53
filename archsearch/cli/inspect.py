"""Commands on one architecture or one space: cost, score, space show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import ARCHITECTURE, ContextTokens, Json, LatentSize, Quiet
from archsearch.cli.output import cost_cells, print_json, print_score, print_table, progress_bar
from snapgen.errors import InputError

if TYPE_CHECKING:
    from archsearch.cost.breakdown import Breakdown
    from archsearch.cost.counter import CostItem


app = typer.Typer()


@app.command(epilog="Example: archsearch cost snapgen-imagenet --latent-size 32 --json")
def cost(
    name: Annotated[str, typer.Argument(help=f"{ARCHITECTURE}, or tiny-decoder.")],
    latent_size: LatentSize = None,
    context_tokens: ContextTokens = None,
    as_json: Json = False,
) -> None:
    """Count params, MACs and activation memory, by stage and by kind of block; no weights are made."""
    found, about = _counted(name, latent_size, context_tokens)
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


def _counted(name: str, latent_size: int | None, context_tokens: int | None) -> tuple[Breakdown, dict[str, str | int]]:
    """The breakdown, and what it was counted of.

    Raises:
        InputError: for an unknown name, a bad file, or a latent that does not fit.
    """
    from archsearch.cost.breakdown import breakdown, decoder_breakdown
    from archsearch.studies.lookup import find_architecture, find_conditions
    from snapgen.architecture.presets import TINY_DECODER
    from snapgen.autoencoders.tiny_decoder import PAPER

    conditions = find_conditions(name).with_overrides(latent_size=latent_size, context_tokens=context_tokens)
    latent, tokens = conditions.latent_size, conditions.context_tokens
    if name == TINY_DECODER:
        return decoder_breakdown(PAPER, latent), {"latent": latent, "image": latent * 2 ** (len(PAPER["widths"]) - 1)}
    arch = find_architecture(name, other_names=(TINY_DECODER,))
    arch.validate_latent_size(latent, source="--latent-size")
    about: dict[str, str | int] = {"architecture_id": arch.id, "latent": latent, "context_tokens": tokens}
    return breakdown(arch, latent, context_tokens=tokens), about


def _row(name: str, part: CostItem, total: CostItem) -> tuple[str, ...]:
    params, macs, peak = cost_cells(part)
    written = f"{part.written_bytes / 1e6:.1f}"
    return name, params, _percent(part.params, total.params), macs, _percent(part.macs, total.macs), peak, written


def _shares(macs: Mapping[str, int]) -> str:
    whole = sum(macs.values())
    return ", ".join(f"{operator} {value / 1e9:.3f} G ({_percent(value, whole)} %)" for operator, value in macs.items())


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


space_app = typer.Typer(help="Look at a search space before anyone spends a minute.")
app.add_typer(space_app, name="space")


@app.command(epilog="Example: archsearch score snapgen-like.json --study emoji --json")
def score(
    architecture: Annotated[str, typer.Argument(help=f"A reference of the study's space, or: {ARCHITECTURE}.")],
    study: Annotated[
        str, typer.Option(help="The study or run whose space, protocol and latency device are used.")
    ] = "emoji",
    quality: Annotated[bool, typer.Option(help="Train it too; --no-quality: cost and latency alone.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score one architecture as a study would: cost, latency, and quality by the short run."""
    from archsearch.score import Score
    from archsearch.studies.lookup import find_architecture, find_config
    from archsearch.studies.search.scorer import ArchsearchScorer

    settings = find_config(study)
    space = settings.load_space()
    point = space.reference_points().get(architecture)
    arch = find_architecture(architecture) if point is None else space.architecture(point)
    twin = space.twin(point) if point is not None else None
    if quality and space.proxy is not None and twin is None:
        problem = f"{architecture} has no twin in {space.proxy.name}, which {study} trains in its place"
        remedy = f"name one of {', '.join(space.reference_points())}, or give --no-quality"
        raise InputError("ARCHITECTURE", problem, remedy)
    with progress_bar("preparing", quiet=quiet or as_json) as progress, TemporaryDirectory() as scratch:
        scorer = ArchsearchScorer(settings, space)
        if quality or space.proxy is None:
            scorer.check(twin or arch)
        result = Score(cost=scorer.cost(arch), latency=scorer.latency(arch))
        if quality:
            trained = scorer.quality(
                twin or arch, seeds=settings.first_seeds, progress=progress, artifacts=Path(scratch)
            )
            result = result.model_copy(update={"quality": trained})
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        grid = f"{space.latent_size}×{space.latent_size}"
        typer.echo(
            f"{architecture}: latent {grid}, {space.context_tokens} context tokens, as the space {space.name} says"
        )
        print_score(result)


@space_app.command("show", epilog="Example: archsearch space show snapgen")
def space_show(
    space: Annotated[str, typer.Argument(help="A shipped space (emoji, emoji-large, snapgen) or a YAML file.")],
    study: Annotated[
        str | None, typer.Option(help="A study in the space: also print what its model of quality makes of it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a space's knobs, its size, what its candidates cost, and whether its limits can be met."""
    from archsearch.cost.counter import cost
    from archsearch.spaces.loading import load_space
    from archsearch.spaces.summary import summarize

    with progress_bar("counting costs", quiet=quiet or as_json) as progress:
        summary = summarize(load_space(space), cost, progress=progress)
    if as_json:
        print_json(asdict(summary))
        return
    knobs = [
        (k.name, ", ".join(f"[{c}]" if i == k.base else c for i, c in enumerate(k.choices))) for k in summary.knobs
    ]
    print_table(f"Space {summary.name}: {len(knobs)} knobs, the base's choice in brackets", ("knob", "choices"), knobs)
    about = "" if summary.distinct_is_exact else "about "
    typer.echo(
        f"\n{summary.size:.4g} points (10^{summary.log_size:.1f}), {about}{summary.distinct:.4g} architectures\n"
    )
    members = [*summary.references, summary.smallest, summary.middle, summary.largest]
    rows = [(m.name, m.id, *cost_cells(m), "yes" if m.within_limits else "no") for m in members]
    header = ("", "id", "params M", "MACs G", "activations MB", "within limits")
    grid = f"{summary.latent_size}×{summary.latent_size}"
    print_table(f"Cost at a latent of {grid}, {summary.context_tokens} context tokens", header, rows)
    if summary.limits:
        limits = ", ".join(f"{name} ≤ {most:g}" for name, most in summary.limits.items())
        verdict = f"met by {summary.within_limits:.0%} of {summary.samples} random points"
        typer.echo(f"\nLimits {limits}: {verdict if summary.can_be_met else 'met by nothing that was looked at'}")
    if study is not None:
        typer.echo(f"\n{_model_of(study, summary.name)}")


def _model_of(study: str, space: str) -> str:
    """A study's model of quality, in one sentence."""
    from archsearch.reports.study.data import load_study_data
    from archsearch.reports.study.quality_model import quality_model
    from archsearch.studies.storage.database import open_study

    data = load_study_data(open_study(study))
    if (own := data.attrs["space"]["name"]) != space:
        raise InputError("--study", f"{study} is in the space {own}", f"show the space {own}")
    model = quality_model(data)
    return model.text(data) if model else f"{study} has no model of quality: too few candidates, or another sampler."
