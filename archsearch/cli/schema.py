"""The command schema: the JSON schema of a kind of file, for an editor."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: archsearch schema study > study.schema.json")
def schema(
    kind: Annotated[
        str, typer.Argument(help="study (of ablations and evolutions, too), space, recipe, comparison or architecture.")
    ],
) -> None:
    """Print the JSON schema of a kind of YAML file, by which editors complete and check it.

    A file names its schema in its first line: # yaml-language-server: $schema=study.schema.json
    """
    from archsearch.library import schema_path

    typer.echo(schema_path(kind).read_text(encoding="utf-8"), nl=False)
