"""The commands that train: train and compare-recipes by a recipe, and train-autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import ARCHITECTURE, Json, On, Quiet
from archsearch.cli.output import check_out, print_json, print_table, progress_bar, show_log
from snapgen.errors import InputError

if TYPE_CHECKING:
    from archsearch.library.machines import Cluster
    from archsearch.training.dry_run import Plan, StagePlan
    from archsearch.training.machine_plan import StageOnMachines
    from archsearch.training.recipe import Recipe
    from snapgen.architecture.schema import Architecture

app = typer.Typer()


@app.command(
    epilog="Example: archsearch train emoji --architecture emoji:best    The same command resumes a killed run."
)
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (emoji, …) or a YAML file.")],
    architecture: Annotated[str | None, typer.Option(help=f"{ARCHITECTURE}, if not the recipe's.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run, if not the recipe's: the folder runs/NAME.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random, if not the recipe's.")] = None,
    stop_after: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and train nothing.")] = False,
    on: On = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an architecture by a recipe, from images to a pipeline; or go on with a run that was stopped."""
    from archsearch.library.machines import parse_cluster
    from archsearch.studies.lookup import find_architecture
    from archsearch.training.recipe import load_recipe

    found = load_recipe(recipe).with_overrides(architecture=architecture, name=name, seed=seed)
    with nullcontext() if architecture else found.error_context("architecture"):
        net = find_architecture(found.architecture)
    if stop_after is not None and stop_after not in [stage.name for stage in found.stages]:
        names = ", ".join(stage.name for stage in found.stages)
        raise InputError("--stop-after", f"{stop_after!r} is not a stage", f"use one of: {names}")
    cluster = None if on is None else parse_cluster(on)
    if dry_run:
        _plan(found, net, cluster, as_json=as_json)
        return
    if cluster is not None:
        raise InputError("--on", "plans for another machine, and trains nothing", "add --dry-run")
    from archsearch.training import run as training

    if not quiet:
        show_log()
    log: Callable[[str], None] = (lambda _: None) if quiet else typer.echo
    folder = training.train(found, net, log=log, stop_after=stop_after)
    typer.echo(f"Run: {folder.resolve()}")


@app.command(
    "compare-recipes", epilog="Example: archsearch compare-recipes distillation --out distillation.md    Resumes."
)
def compare_recipes(
    comparison: Annotated[str, typer.Argument(help="A shipped comparison (distillation, …) or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="A .md file; a .csv is put beside it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train variants of a recipe over the same seeds, and say what each choice is worth."""
    import archsearch.reports.comparison
    from archsearch.reports.rendering import tables
    from archsearch.training.comparison import compare, load_comparison
    from snapgen.io.atomic import atomic_write_texts

    csv = out and out.with_suffix(".csv")
    check_out(out, ".md")
    check_out(csv, ".csv")
    found = load_comparison(comparison)
    results = compare(found, log=(lambda _: None) if quiet else lambda line: typer.echo(line, err=True))
    page = archsearch.reports.comparison.markdown(found, results)
    if out and csv:
        atomic_write_texts({out: page, csv: tables.csv(archsearch.reports.comparison.frame(found, results))})
    typer.echo(page)


def _plan(recipe: Recipe, net: Architecture, cluster: Cluster | None, *, as_json: bool) -> None:
    from archsearch.training.compatibility import resolve_shapes
    from archsearch.training.dry_run import plan
    from archsearch.training.machine_plan import plan_on

    given = resolve_shapes(recipe, without_files=True)
    examples, captions, missing = _counted(recipe)
    missing = [*given.missing, *missing]
    found = plan(recipe, net, given, examples=examples, captions=captions, timed=cluster is None)
    on = plan_on(found, cluster) if cluster else []
    if as_json:
        total = {"images": found.images, "steps": found.steps, "macs": found.macs}
        machines = {"on": [asdict(stage) for stage in on]} if on else {}
        print_json({"architecture_id": net.id, **asdict(found), **total, "missing": missing, **machines})
        return
    title = f"{recipe.name}: architecture {net.id}"
    if cluster:
        _print_machines(f"{title}, on {cluster.count} × {cluster.name}", found, on, cluster)
    else:
        _print_plan(title, found)
    if missing:
        typer.echo(f"Not on this machine, planned as the recipe expects it: {', '.join(dict.fromkeys(missing))}")


def _print_machines(title: str, found: Plan, on: list[StageOnMachines], cluster: Cluster) -> None:
    seconds = sum(stage.seconds for stage in on)
    dollars = cluster.dollars(seconds)
    lines: list[tuple[str, Callable[[StageOnMachines], str], str]] = [
        ("processes", lambda s: f"{s.processes:,}", ""),
        ("batch a process", lambda s: f"{s.batch:,.4g}", ""),
        ("in parts", lambda s: f"{s.gradient_accumulation_steps:,}", ""),
        ("memory a GPU", lambda s: f"{_count(s.memory)}B", ""),
        ("fits", lambda s: "no" if s.problem else "yes", ""),
        ("time", lambda s: _time(s.seconds), _time(seconds)),
        ("cost", lambda s: _dollars(s.dollars), _dollars(dollars)),
    ]
    rows = [
        ("images", *(_count(stage.images) for stage in found.stages), _count(found.images)),
        ("MACs", *(f"{stage.macs:.2e}" for stage in found.stages), f"{found.macs:.2e}"),
        ("precision", *(stage.precision for stage in found.stages), ""),
        *((name, *map(of, on), total) for name, of, total in lines),
    ]
    print_table(title, ("", *(stage.name for stage in on), "total"), rows)
    for stage, planned in zip(on, found.stages, strict=True):
        own = planned.batch // planned.micro_batch_size
        if stage.problem:
            typer.echo(f"{stage.name}: {stage.problem}")
        elif stage.gradient_accumulation_steps != own:
            typer.echo(
                f"{stage.name}: set gradient_accumulation_steps to {stage.gradient_accumulation_steps}, from {own}"
            )
    caches = ", ".join(f"{name} {_count(size)}B" for name, size in found.disk.items())
    typer.echo(f"\nDisk: {caches or 'unknown'}.\n{cluster.assumptions}")
    typer.echo("Encoding, evaluation, checkpoints and waiting for data are not in it.")


def _dollars(amount: float | None) -> str:
    return "?" if amount is None else f"${amount:,.0f}" if amount >= 10 else f"${amount:.2f}"


def _counted(recipe: Recipe) -> tuple[int | None, int | None, list[str]]:
    """Training images and different captions; as the recipe expects them where the data are not here, and what then is
    missing.
    """
    from snapgen.conditioning.embeddings import deduplicate
    from snapgen.data.dataset import load_dataset
    from snapgen.training.stages import Stage

    sides = [stage.resolution for stage in recipe.stages if isinstance(stage, Stage)]
    try:
        images = load_dataset(recipe.data, split="train", resolution=min(sides, default=32))
    except InputError as error:
        if recipe.expected_shapes is None:
            with recipe.error_context("data"):
                raise
        return recipe.expected_shapes.images, recipe.expected_shapes.captions, [error.source]
    return len(images), len(deduplicate(images.captions)[0]), []


def _print_plan(title: str, found: Plan) -> None:
    """A column a stage; their numbers multiply and add up."""
    for stage in found.stages:
        typer.echo(f"{stage.name}: {stage.description}")
    typer.echo()
    lines: list[tuple[str, Callable[[StagePlan], str], str]] = [
        ("net", lambda s: _count(s.net_params), ""),
        ("trained", lambda s: _count(s.params), ""),
        ("teacher", lambda s: _count(s.teacher_params) if s.teacher_params else "", ""),
        ("batch", lambda s: f"{s.batch:,}", ""),
        ("steps", lambda s: f"{s.steps:,}", f"{found.steps:,}"),
        ("images", lambda s: _count(s.images), _count(found.images)),
        ("epochs", lambda s: "?" if s.epochs is None else f"{s.epochs:.3g}", ""),
        ("MACs", lambda s: f"{s.macs:.2e}", f"{found.macs:.2e}"),
        ("time", lambda s: _time(found.seconds(s.macs)), _time(found.seconds(found.macs))),
        ("memory", lambda s: f"{_count(s.memory)}B", ""),
        ("+ an image", lambda s: f"{_count(s.image_memory)}B", ""),
        ("at a time", lambda s: f"{s.micro_batch_size:,}", ""),
    ]
    rows = [(name, *map(of, found.stages), total) for name, of, total in lines]
    print_table(title, ("", *(stage.name for stage in found.stages), "total"), rows)
    typer.echo()
    images = "an unknown number of" if found.examples is None else f"{found.examples:,}"
    caches = ", ".join(f"{name} {_count(size)}B" for name, size in found.disk.items())
    typer.echo(f"Data: {images} training images. Kept on disk for them: {caches or 'unknown'}.")
    rate = "unknown" if found.macs_per_second is None else f"{_count(found.macs_per_second)}MAC/s"
    typer.echo(
        "net, trained, teacher: parameters; trained are also a projector's and a discriminator's heads.\n"
        f"time: predicted from MACs alone, at the rate ({rate}) of a pass of the student in float32 on this machine's "
        "CPU, one process. Encoding, evaluation and checkpoints are not in it, and other resolutions and the teacher "
        "run at other rates: an order of magnitude.\n"
        "memory: predicted, of a process: weights, gradients, moments and averages, then for each of the images it "
        "takes at a time. With N processes each takes an N-th of the batch; gradient_accumulation_steps splits that."
    )


def _count(number: float) -> str:
    """With three digits and k, M, G, T, P."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.4g} {unit}" if unit == "M" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} P"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    for size, unit, most in ((1, "s", 300), (60, "min", 120), (3600, "h", 100), (86400, "days", 1000)):
        if seconds < size * most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / (365 * 86400):,.0f} years"


@app.command("train-autoencoder", epilog="Example: archsearch train-autoencoder --out runs/autoencoder    Resumes.")
def train_autoencoder(
    out: Annotated[Path, typer.Option(help="Folder that gets the weights, their configuration and a README.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train; sets the steps by a few timed ones.")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train, whatever time they take.")] = None,
    data: Annotated[str, typer.Option(help="emoji, a folder of images or webdataset shards.")] = "emoji",
    resolutions: Annotated[str, typer.Option(help="Sides of the images in pixels, taken in turn.")] = "32,32,64",
    encoder: Annotated[str | None, typer.Option(help="Train a tiny decoder for this autoencoder's encoder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train the small autoencoder, or a tiny decoder for an encoder that is given, on one thread."""
    sides = _sides(resolutions)
    from snapgen.autoencoders.train_to_folder import train_to_folder

    log: Callable[[str], None] = (lambda _: None) if quiet else typer.echo
    with progress_bar("training", quiet=quiet) as progress:
        quality = train_to_folder(
            out,
            minutes=minutes,
            steps=steps,
            data=data,
            resolutions=sides,
            encoder=encoder,
            seed=seed,
            progress=progress,
            log=log,
        )
    typer.echo(f"{out}: " + "; ".join(f"{side} px {value}" for side, value in quality.items()))


def _sides(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
        raise InputError("--resolutions", f"{text!r} are not sides of images", "write e.g. 32,64 (16 or more each)")
    return tuple(int(part) for part in parts)
