"""The commands on architectures and spaces: score, space show."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.printing import bar, cost_cells, print_json, print_score, print_table
from archsearch.score import Score
from snapgen import presets

app = typer.Typer()
space_app = typer.Typer(help="Look at a search space before anyone spends a minute.")
app.add_typer(space_app, name="space")


@app.command(epilog="Example: archsearch score snapgen-like.json --study emoji --json")
def score(
    architecture: Annotated[str, typer.Argument(help="A preset, a JSON or YAML file, or a reference of the space.")],
    study: Annotated[str, typer.Option(help="The study whose space, protocol and latency device are used.")] = "emoji",
    quality: Annotated[bool, typer.Option(help="Train it too; --no-quality: cost and latency alone.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score one architecture as a study would: cost, latency, and quality by the short run."""
    from studies.scorer import ArchsearchScorer
    from studies.settings import find

    settings = find(study)
    space = settings.load_space()
    point = space.points_of().get(architecture)
    arch = presets.resolve(architecture) if point is None else space.architecture(point)
    with bar("preparing", quiet=quiet or as_json) as tell, TemporaryDirectory() as scratch:
        scorer = ArchsearchScorer(settings, space)
        scorer.check(arch)
        result = Score(cost=scorer.cost(arch), latency=scorer.latency(arch))
        if quality:
            trained = scorer.quality(arch, progress=lambda stage, done: tell(done, stage), artifacts=Path(scratch))
            result = result.model_copy(update={"quality": trained})
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_score(result)


@space_app.command("show", epilog="Example: archsearch space show snapgen")
def space_show(
    space: Annotated[str, typer.Argument(help="A shipped space (emoji, emoji-large, snapgen) or a YAML file.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a space's knobs, its size, what its candidates cost, and whether its limits can be met."""
    from archsearch.cost import cost
    from spaces.space import Space

    with bar("counting costs", quiet=quiet or as_json) as tell:
        summary = Space.load(space).describe(cost, progress=tell)
    if as_json:
        print_json(summary.to_dict())
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
