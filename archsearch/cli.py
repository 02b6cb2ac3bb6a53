"""The command line: ``archsearch search | report | best | audit | score | space show``.

Heavy imports are made inside the commands, so that ``--help`` and a mistyped name answer at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NoReturn, Protocol

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from archsearch.score import QUALITIES, Score, metric_label
from snapgen import presets
from snapgen.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="archsearch",
    help="Search text-to-image diffusion U-Nets for quality and measured latency.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
space_app = typer.Typer(help="Look at a search space before anyone spends a minute.")
app.add_typer(space_app, name="space")

Study = Annotated[str, typer.Argument(help="A shipped study (emoji, emoji_large, snapgen) or a YAML file.")]
Storage = Annotated[str | None, typer.Option(help="Where the study is, if not where its YAML says: an Optuna URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only results and warnings.")]


@app.command(epilog="Example: archsearch search emoji    The same command resumes a killed search.")
def search(
    study: Study,
    trials: Annotated[int | None, typer.Option(min=1, help="Score so many candidates, whatever the YAML says.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes on this machine.")] = None,
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Run a study, or go on with it, and write its report."""
    import reports.pareto
    import studies.search
    from studies.settings import find

    settings = find(study).overridden(trials=trials, workers=workers, storage=storage)
    done = studies.search.search(settings, quiet=quiet)
    page = reports.pareto.write(done, settings.folder / "report.html", source=study)
    typer.echo(f"Report: {page.resolve()}")


@app.command(epilog="Example: archsearch report emoji --out front.html")
def report(
    study: Study,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file; a CSV is put beside it.")] = None,
) -> None:
    """Write a study's report: one HTML file that needs no network, and a CSV beside it."""
    import reports.pareto
    from studies.settings import find
    from studies.storage import existing

    settings = find(study).overridden(storage=storage)
    page = reports.pareto.write(existing(settings), out or settings.folder / "report.html", source=study)
    typer.echo(f"Report: {page.resolve()}")


@app.command(epilog="Example: archsearch best emoji --objective latency_ms --json")
def best(
    study: Study,
    objective: Annotated[str | None, typer.Option(help="The best of one objective; default: the front's knee.")] = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="Write the architecture to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Name a study's best candidate and why; works on a running or killed study too."""
    from reports.pareto import put
    from studies.settings import find
    from studies.storage import existing
    from studies.trials import best as best_of

    settings = find(study).overridden(storage=storage)
    choice = best_of(existing(settings), objective=objective)
    candidate = choice.candidate
    if out:
        put(out, candidate.architecture.to_json())
    if as_json:
        _print_json(
            {
                "trial": candidate.number,
                "architecture_id": candidate.architecture.id,
                "reason": choice.reason,
                "score": candidate.score.model_dump(mode="json"),
                "architecture": candidate.architecture.model_dump(mode="json"),
            }
        )
        return
    typer.echo(f"Trial {candidate.number}, architecture {candidate.architecture.id}: {choice.reason}")
    _print_score(candidate.score)


@app.command(epilog="Example: archsearch audit emoji --factor 5 --out audit.md    Resumes as a search does.")
def audit(
    study: Study,
    factor: Annotated[int, typer.Option(min=2, help="Steps of the long run over the short one's.")] = 5,
    candidates: Annotated[int | None, typer.Option(min=4, help="At most so many, spread over the ranking.")] = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="A .md or .csv file; the other is put beside it.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a study's candidates several times as long, and say how far its scores can be trusted."""
    from reports import pareto
    from reports.audit import markdown, write
    from studies.audit import audit as run
    from studies.settings import find
    from studies.storage import existing

    settings = find(study).overridden(storage=storage)
    rows = run(settings, factor=factor, candidates=candidates, quiet=quiet or as_json)
    page = pareto.write(existing(settings), settings.folder / "report.html", source=study)
    if out:
        write(rows, out)
    if as_json:
        _print_json({"factor": factor, "rows": [asdict(row) for row in rows]})
    else:
        typer.echo(markdown(rows))
        typer.echo(f"Report: {page.resolve()}")


@app.command(epilog="Example: archsearch score snapgen-like.json --study emoji --json")
def score(
    architecture: Annotated[str, typer.Argument(help="A preset, a JSON or YAML file, or a reference of the space.")],
    study: Annotated[str, typer.Option(help="The study whose space, protocol and latency device are used.")] = "emoji",
    quality: Annotated[bool, typer.Option(help="Train it too; --no-quality: cost and latency alone.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score one architecture as a study would: cost, latency, and quality by the short run."""
    from spaces.space import Space
    from studies.scorer import ArchsearchScorer
    from studies.settings import find

    settings = find(study)
    space = Space.load(settings.space)
    point = space.points_of().get(architecture)
    arch = presets.resolve(architecture) if point is None else space.architecture(point)
    with _bar("preparing", quiet=quiet or as_json) as tell, TemporaryDirectory() as scratch:
        scorer = ArchsearchScorer(settings, space)
        scorer.check(arch)
        result = Score(cost=scorer.cost(arch), latency=scorer.latency(arch))
        if quality:
            trained = scorer.quality(arch, progress=lambda stage, done: tell(done, stage), artifacts=Path(scratch))
            result = result.model_copy(update={"quality": trained})
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        _print_score(result)


@space_app.command("show", epilog="Example: archsearch space show snapgen")
def space_show(
    space: Annotated[str, typer.Argument(help="A shipped space (emoji, emoji-large, snapgen) or a YAML file.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a space's knobs, its size, what its candidates cost, and whether its limits can be met."""
    from archsearch.cost import cost
    from spaces.space import Space

    with _bar("counting costs", quiet=quiet or as_json) as tell:
        summary = Space.load(space).describe(cost, progress=tell)
    if as_json:
        _print_json(summary.to_dict())
        return
    knobs = [
        (k.name, ", ".join(f"[{c}]" if i == k.base else c for i, c in enumerate(k.choices))) for k in summary.knobs
    ]
    _print_table(f"Space {summary.name}: {len(knobs)} knobs, the base's choice in brackets", ("knob", "choices"), knobs)
    about = "" if summary.distinct_is_exact else "about "
    typer.echo(
        f"\n{summary.size:.4g} points (10^{summary.log_size:.1f}), {about}{summary.distinct:.4g} architectures\n"
    )
    members = [*summary.references, summary.smallest, summary.middle, summary.largest]
    rows = [(m.name, m.id, *_cost_cells(m), "yes" if m.within_limits else "no") for m in members]
    header = ("", "id", "params M", "MACs G", "activations MB", "within limits")
    grid = f"{summary.latent_size}×{summary.latent_size}"
    _print_table(f"Cost at a latent of {grid}, {summary.context_tokens} context tokens", header, rows)
    if summary.limits:
        limits = ", ".join(f"{name} ≤ {most:g}" for name, most in summary.limits.items())
        verdict = f"met by {summary.within_limits:.0%} of {summary.samples} random points"
        typer.echo(f"\nLimits {limits}: {verdict if summary.can_be_met else 'met by nothing that was looked at'}")


def main() -> NoReturn:
    """Entry point: every mistake of the user's is one line on standard error and exit status 2."""
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; the same command resumes", INTERRUPTED)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "archsearch"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help", BAD_INPUT)
    except BrokenPipeError:
        # The reader of our output (head, a pager) has gone; that is no mistake.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(line: str, status: int) -> NoReturn:
    sys.stderr.write(f"archsearch: {' '.join(line.split())}\n")
    sys.exit(status)


def _print_json(values: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def _print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: a choice may stand in brackets
    Console().print(table)


def _cost_cells(cost: Any) -> tuple[str, str, str]:
    return f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.activation_bytes / 1e6:.1f}"


class Tell(Protocol):
    """Told the share done, and of what."""

    def __call__(self, done: float, stage: str = ...) -> None: ...


@contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[Tell]:
    """A bar for a share done, on a terminal; silence elsewhere."""
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda done, stage=what: progress.update(task, completed=done, description=stage)


def _print_score(score: Score) -> None:
    extractor = score.quality.extractor if score.quality else ""
    rows = [("params", f"{score.cost.params / 1e6:.3f} M"), ("MACs", f"{score.cost.macs / 1e9:.3f} G")]
    if latency := score.latency:
        spread = f"{latency.lower_quartile_ms:.3g}–{latency.upper_quartile_ms:.3g}"
        rows.append(("latency", f"{latency.median_ms:.3g} ms [{spread}], {latency.source}, {latency.device}"))
    for name in QUALITIES:
        estimate = getattr(score.quality, name, None)
        if estimate:
            label = metric_label(name, extractor)
            rows.append((label, f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"))
    _print_table("", ("", ""), rows)
