"""The command on ablations: ablate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from archsearch.cli.options import Json, Quiet, Storage
from archsearch.cli.printing import print_json

app = typer.Typer()


@app.command(epilog="Example: archsearch ablate emoji_ablation --out table.md    The same command resumes.")
def ablate(
    study: Annotated[str, typer.Argument(help="A shipped ablation (emoji_ablation, snapgen_ablation) or a YAML file.")],
    quality: Annotated[
        str | None, typer.Option(help="Train every row too and rank by this, e.g. frechet_distance.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes on this machine.")] = None,
    storage: Storage = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table here too: .md, .tex, .csv or .html; the others beside it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every row of an ablation, and write its table: ours beside the published."""
    import reports.ablation
    import studies.ablation
    from studies.settings import find

    reports.ablation.check_form(out)
    settings = studies.ablation.with_quality(find(study), quality)
    settings = settings.overridden(workers=workers, storage=storage)
    done = studies.ablation.found(studies.ablation.ablate(settings, quiet=quiet or as_json))
    page = reports.ablation.write(done, settings.folder / "ablation.html")
    if out:
        reports.ablation.write(done, out)
    if as_json:
        print_json(reports.ablation.plain(done))
        return
    typer.echo(reports.ablation.markdown(done))
    typer.echo(f"Report: {page.resolve()}")
