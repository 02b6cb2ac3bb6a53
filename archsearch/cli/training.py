"""The commands that train: train, compare."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import Json, Quiet
from archsearch.cli.printing import print_json, print_table
from snapgen.errors import InputError

if TYPE_CHECKING:
    from snapgen.arch import Architecture
    from studies.recipe import Recipe

app = typer.Typer()


@app.command(epilog="Example: archsearch train train_emoji --arch emoji:best    The same command resumes a killed run.")
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (train_emoji, …) or a YAML file.")],
    arch: Annotated[str | None, typer.Option(help="A preset, a file, STUDY:best or STUDY:TRIAL.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run, if not the recipe's: the folder runs/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random, if not the recipe's.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and train nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an architecture by a recipe, from images to a pipeline; or go on with a run that was stopped."""
    from studies.recipe import architecture, find

    given = {"arch": arch, "name": name, "seed": seed}
    found = find(recipe).changed({key: value for key, value in given.items() if value is not None})
    net = architecture(found.arch)
    if until is not None and until not in [stage.name for stage in found.stages]:
        names = ", ".join(stage.name for stage in found.stages)
        raise InputError("--until", f"{until!r} is no stage", f"use one of: {names}")
    if dry_run:
        _plan(found, net, as_json=as_json)
        return
    from studies import training

    if not quiet:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("snapgen").setLevel(logging.INFO)
    folder = training.train(found, net, tell=(lambda _: None) if quiet else typer.echo, until=until)
    typer.echo(f"Run: {folder.resolve()}")


@app.command(epilog="Example: archsearch compare compare_distillation --out distillation.md    Resumes.")
def compare(
    comparison: Annotated[str, typer.Argument(help="A shipped comparison (compare_distillation, …) or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="A .md file; a .csv is put beside it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train variants of a recipe over the same seeds, and say what each choice is worth."""
    import reports.comparison
    from reports.pareto import put
    from studies.comparison import compare as run
    from studies.comparison import find

    found = find(comparison)
    results = run(found, tell=(lambda _: None) if quiet else lambda line: typer.echo(line, err=True))
    page = reports.comparison.markdown(found, results)
    if out:
        put(out.with_suffix(".md"), page)
        put(out.with_suffix(".csv"), reports.comparison.frame(found, results).to_csv(index=False))
    typer.echo(page)


def _plan(recipe: Recipe, net: Architecture, *, as_json: bool) -> None:
    from snapgen.data import open_images
    from studies.plan import plan
    from studies.shapes import shapes

    given = shapes(recipe, without_files=True)
    missing = list(given.missing)
    try:
        sides = [stage.resolution for stage in recipe.stages if hasattr(stage, "resolution")]
        examples = len(open_images(recipe.data, split="train", resolution=min(sides))) if sides else None
    except InputError as error:
        examples = None
        missing.append(error.source)
    stages = plan(recipe, net, given, examples=examples, timed=True)
    total = {"images": sum(s.images for s in stages), "steps": sum(s.steps for s in stages)}
    seconds = sum(s.seconds or 0 for s in stages)
    if as_json:
        listed = [asdict(stage) for stage in stages]
        print_json({"architecture_id": net.id, "stages": listed, **total, "seconds": seconds, "missing": missing})
        return
    rows = [
        (
            stage.name,
            stage.does,
            f"{stage.params / 1e6:.2f} M",
            f"{stage.images:,}",
            f"{stage.steps:,}",
            "?" if stage.epochs is None else f"{stage.epochs:.1f}",
            f"{stage.memory / 1e9:.1f} GB",
            _time(stage.seconds or 0),
        )
        for stage in stages
    ]
    rows.append(("total", "", "", f"{total['images']:,}", f"{total['steps']:,}", "", "", _time(seconds)))
    header = ("stage", "what", "trained", "images", "steps", "epochs", "memory", "time")
    print_table(f"{recipe.name}: architecture {net.id}", header, rows)
    typer.echo(
        "Time: predicted from multiplications at the rate of a few passes of the student in float32 on this machine's "
        "CPU, one process; data, evaluation and what a pass costs at another size or precision are not in it, so take "
        "it for a factor of two. Memory: predicted, without what libraries hold."
    )
    for source in missing:
        typer.echo(f"Not on this machine, planned as the recipe expects it: {source}")


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1 / 12:
        return f"{seconds:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.0f} h" if hours < 200 else f"{hours / 24:,.0f} days"
