"""Commands on a study: search, ablate, evolve, report, best, audit; tabulate, replay and analyze its runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import TABLE, BegunStudy, DryRun, Json, On, Quiet, Retry, Storage, Study
from archsearch.cli.output import check_out, print_json, print_score, progress_bar, show_log
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy

    from archsearch.studies.config.study import StudyConfig

app = typer.Typer()


@app.command(epilog="Example: archsearch ablate emoji --out table.md    The same command resumes.")
def ablate(
    study: Annotated[str, typer.Argument(help="A shipped ablation (emoji, snapgen) or a YAML file.")],
    quality: Annotated[
        str | None, typer.Option(help="Train every row too and rank by this, e.g. frechet_distance.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes on this machine.")] = None,
    storage: Storage = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table here too: .md, .tex, .csv or .html; the others beside it.")
    ] = None,
    retry: Retry = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every row of an ablation, and write its table: ours beside the published."""
    from archsearch.reports.ablation import report, table
    from archsearch.studies.config.study import load_config
    from archsearch.studies.experiments import ablation, ablation_results
    from archsearch.studies.search.run import retry_given_up

    show_log(quiet=quiet or as_json)
    check_out(out, *report.SUFFIXES)
    settings = ablation.train_rows_too(load_config(study, "ablation"), quality)
    settings = settings.with_overrides(workers=workers, storage=storage)
    if dry_run:
        from archsearch.studies.experiments.search_time import search_time

        typer.echo(search_time(ablation.with_rows_as_points(settings)).text)
        return
    if retry:
        retry_given_up(settings)
    done = ablation_results.load_results(ablation.ablate(settings, quiet=quiet or as_json))
    page = report.write_ablation(done, settings.folder / "ablation.html")
    if out:
        report.write_ablation(done, out)
    if as_json:
        print_json(report.to_dict(done))
        return
    typer.echo(table.markdown(done))
    typer.echo(f"Report: {page.resolve()}")


@app.command(epilog="Example: archsearch evolve emoji    The same command resumes a killed one.")
def evolve(
    study: Annotated[str, typer.Argument(help="A shipped study that evolves (emoji) or a YAML file.")],
    storage: Storage = None,
    retry: Retry = False,
    quiet: Quiet = False,
) -> None:
    """Evolve a trained network to a latency: drop or copy the blocks worth least or most per ms, train on, repeat."""
    from archsearch.studies.config.study import load_config
    from archsearch.studies.evolution import run
    from archsearch.studies.search.run import retry_given_up

    show_log(quiet=quiet)
    settings = load_config(study, "evolution").with_overrides(storage=storage)
    if retry:
        retry_given_up(settings)
    _write_report(run.evolve(settings, quiet=quiet), settings.folder / "report.html", source=study)


@app.command(epilog="Example: archsearch search emoji    The same command resumes a killed search.")
def search(
    study: Study,
    trials: Annotated[int | None, typer.Option(min=1, help="Score so many candidates, whatever the YAML says.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes on this machine.")] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", help="Begin with the scored candidates of another study of this protocol, or a .jsonl."),
    ] = None,
    storage: Storage = None,
    retry: Retry = False,
    dry_run: DryRun = False,
    on: On = None,
    quiet: Quiet = False,
) -> None:
    """Run a study, or go on with it, and write its report."""
    from archsearch.library.machines import parse_cluster
    from archsearch.studies.config.study import load_config
    from archsearch.studies.experiments.search_time import plan_study_on, search_time
    from archsearch.studies.search import run

    show_log(quiet=quiet)
    settings = load_config(study).with_overrides(trials=trials, workers=workers, storage=storage, start_from=start_from)
    cluster = parse_cluster(on) if on else None
    if cluster and not dry_run:
        raise InputError("--on", "plans for another machine, and searches nothing", "add --dry-run")
    if cluster:
        typer.echo(plan_study_on(settings, cluster).text)
        return
    if dry_run:
        typer.echo(search_time(settings).text)
        return
    if retry:
        run.retry_given_up(settings)
    _write_report(run.search(settings, quiet=quiet), settings.folder / "report.html", source=study)


@app.command(epilog="Example: archsearch report emoji --out front.html")
def report(
    study: BegunStudy,
    storage: Storage = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML file; a CSV is put beside it. Or a .jsonl: the scores, for search --from."),
    ] = None,
    compare_with: Annotated[str | None, typer.Option(help="Another study, to show beside this one.")] = None,
) -> None:
    """Write a study's report: one HTML file that needs no network, and a CSV beside it; or a table of its scores."""
    from archsearch.studies.lookup import find_config
    from archsearch.studies.search.known_scores import TABLE
    from archsearch.studies.storage.database import load_study

    show_log()
    check_out(out, ".html", TABLE)
    settings = find_config(study, storage=storage)
    other = load_study(find_config(compare_with, storage=storage)) if compare_with else None
    path = out or settings.folder / "report.html"
    found = load_study(settings)
    _tell_changes(settings, found)
    _write_report(found, path, source=study, compare_with=other)


def _tell_changes(settings: StudyConfig, study: OptunaStudy) -> None:
    """Say where the settings differ from those with which the study was searched."""
    from archsearch.studies.lookup import changed_settings

    for line in changed_settings(settings, study):
        typer.echo(line, err=True)


def _write_report(study: OptunaStudy, path: Path, *, source: str, compare_with: OptunaStudy | None = None) -> None:
    from archsearch.reports.study_report import write_report
    from archsearch.studies.search.known_scores import is_table

    written = write_report(study, path, source=source, compare_with=compare_with).resolve()
    typer.echo(f"{'Scores' if is_table(written) else 'Report'}: {written}")


@app.command(epilog="Example: archsearch best emoji --objective latency_ms --json")
def best(
    study: BegunStudy,
    objective: Annotated[str | None, typer.Option(help="The best of one objective; default: the front's knee.")] = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="Write the architecture to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Name a study's best candidate and why; works on a running or killed study too."""
    from archsearch.latency.timed_pass import TimedPass
    from archsearch.studies.lookup import find_config
    from archsearch.studies.search.candidates import best as best_of
    from archsearch.studies.storage.database import load_study
    from snapgen.io.atomic import atomic_write_text

    settings = find_config(study, storage=storage)
    found_study = load_study(settings)
    _tell_changes(settings, found_study)
    choice, timed_pass = best_of(found_study, objective=objective), TimedPass.of_study(found_study.user_attrs)
    candidate = choice.candidate
    if out:
        atomic_write_text(out, candidate.architecture.to_json())
    if as_json:
        print_json(
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
    print_score(candidate.score, interval="95 % interval, spread of seeds pooled over the study,")
    if latency := candidate.score.latency:
        image = timed_pass.image(latency.median_ms)
        typer.echo(f"\nLatency: {timed_pass.text}" + (f"; {image}" if image else ""))
    if candidate.score.quality and timed_pass.mismatch:
        typer.echo(timed_pass.mismatch)


@app.command(epilog="Example: archsearch audit emoji --factor 5 --out audit.md    Resumes as a search does.")
def audit(
    study: BegunStudy,
    factor: Annotated[int, typer.Option(min=2, help="Steps of the long run over the short one's.")] = 5,
    candidates: Annotated[int | None, typer.Option(min=4, help="At most so many, spread over the ranking.")] = None,
    storage: Storage = None,
    out: Annotated[Path | None, typer.Option(help="A .md or .csv file; the other is put beside it.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a study's candidates several times as long, and say how far its scores can be trusted."""
    from archsearch.reports.study.audit import markdown, write_audit
    from archsearch.reports.study_report import write_report
    from archsearch.studies.experiments.proxy_audit import audit as run
    from archsearch.studies.lookup import find_config
    from archsearch.studies.storage.database import load_study

    show_log(quiet=quiet or as_json)
    check_out(out, ".md", ".csv")
    settings = find_config(study, storage=storage)
    if dry_run:
        from archsearch.studies.experiments.proxy_audit import audit_time

        typer.echo(audit_time(settings, factor=factor, candidates=candidates))
        return
    rows = run(settings, factor=factor, candidates=candidates, quiet=quiet or as_json)
    page = write_report(load_study(settings), settings.folder / "report.html", source=study)
    if out:
        write_audit(rows, out, steps=settings.protocol.steps)
    if as_json:
        print_json({"factor": factor, "rows": [asdict(row) for row in rows]})
    else:
        typer.echo(markdown(rows, steps=settings.protocol.steps))
        typer.echo(f"Report: {page.resolve()}")


@app.command(epilog="Example: archsearch tabulate factorial --add factorial_long --full-size snapgen-factorial")
def tabulate(
    study: BegunStudy,
    add: Annotated[
        list[str] | None, typer.Option(help="A further study of its space, whose runs are added; may be repeated.")
    ] = None,
    full_size: Annotated[
        str | None, typer.Option(help="A space with the same knobs: count its costs and predict its latencies.")
    ] = None,
    time_runs: Annotated[
        bool,
        typer.Option("--time-runs", help="Time a part of each run here; default: durations of the trials."),
    ] = False,
    out: Annotated[Path, typer.Option(help="The file; its name ends in .csv or .csv.gz.")] = Path("table.csv.gz"),
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Make a table of all runs of a study that scored every architecture of its space."""
    from archsearch.protocol import ResolvedProtocol
    from archsearch.studies.lookup import find_config
    from archsearch.studies.storage.database import load_study
    from archsearch.studies.tabular.export import tabulate as make
    from archsearch.studies.tabular.file import write_table
    from archsearch.studies.tabular.run_times import RunTimes

    check_out(out, ".csv", ".gz")
    configs = [find_config(name, storage=storage) for name in (study, *(add or []))]
    studies = [load_study(config) for config in configs]
    first_study, times = studies[0], None
    if time_runs:
        times = RunTimes(configs[0].folder, ResolvedProtocol.model_validate(first_study.user_attrs["protocol"]))
    with progress_bar("counting", quiet=quiet) as progress:
        seconds = times.seconds if times else None
        table = make(studies, full_size=full_size, seconds=seconds, progress=progress)
    write_table(table, out)
    typer.echo(f"{len(table.runs):,} runs of {len(table.entries):,} architectures: {out.resolve()}")


@app.command(epilog="Example: archsearch replay emoji --table table.csv.gz --setting gp --setting random")
def replay(
    study: Study,
    table: Annotated[str, typer.Option(help=TABLE)],
    setting: Annotated[
        list[str] | None,
        typer.Option(help="To compare with: a sampler, or settings such as '{sampler: gp, seeds: null}'; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each setting.")] = 30,
    trials: Annotated[int | None, typer.Option(min=1, help="Candidates of a search, whatever the YAML says.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .md, .csv or .html file; the others are put beside it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run a study's searches on a table, in seconds each, and say how soon they find the front."""
    from archsearch.reports.tabular.replay import compare, write_comparison
    from archsearch.studies.config.study import load_config
    from archsearch.studies.tabular.replay import settings_of

    check_out(out, ".md", ".csv", ".html")
    settings = settings_of(load_config(study), setting or [], trials=trials)
    with progress_bar("searching", quiet=quiet) as progress:
        comparison = compare(table, settings, seeds=seeds, progress=progress)
    if out:
        write_comparison(comparison, out)
    typer.echo(comparison.markdown())


@app.command(epilog="Example: archsearch analyze table.csv.gz --out pages")
def analyze(
    table: Annotated[str, typer.Argument(help=TABLE)],
    out: Annotated[Path, typer.Option(help="The folder of the pages.")] = Path("pages"),
) -> None:
    """Write what a table says: effects of every choice, which score ranks, and how many labels a predictor needs."""
    from archsearch.reports.tabular.report import write_pages
    from archsearch.studies.tabular.file import load_table

    for path in write_pages(load_table(table), out):
        typer.echo(path)
