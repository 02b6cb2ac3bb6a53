"""The command on networks that evolve: evolve."""

from __future__ import annotations

from typing import Annotated

import typer

from archsearch.cli.options import Quiet, Storage
from archsearch.cli.printing import show_log

app = typer.Typer()


@app.command(epilog="Example: archsearch evolve emoji_evolve    The same command resumes a killed one.")
def evolve(
    study: Annotated[str, typer.Argument(help="A shipped study that evolves (emoji_evolve) or a YAML file.")],
    storage: Storage = None,
    quiet: Quiet = False,
) -> None:
    """Evolve a trained network to a latency: drop or copy the blocks worth least or most per ms, train on, repeat."""
    import reports.pareto
    import studies.evolve
    from studies.settings import find

    if not quiet:
        show_log()
    settings = find(study).overridden(storage=storage)
    done = studies.evolve.evolve(settings, quiet=quiet)
    page = reports.pareto.write(done, settings.folder / "report.html", source=study)
    typer.echo(f"Report: {page.resolve()}")
