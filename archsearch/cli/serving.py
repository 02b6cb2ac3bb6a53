"""The command of a device that serves searches: device."""

from __future__ import annotations

from typing import Annotated

import typer

from archsearch.cli.options import Quiet

app = typer.Typer()


@app.command(epilog="Example: archsearch device --storage postgresql+psycopg://me@db/studies --device iphone")
def device(
    storage: Annotated[str, typer.Option(help="Where the searches are: their Optuna URL.")],
    device: Annotated[str, typer.Option(help="What to measure on: host, coreml or iphone.")] = "host",
    option: Annotated[
        list[str] | None, typer.Option(help="The device's own setting, KEY=VALUE; may be given again.")
    ] = None,
    idle: Annotated[
        float | None, typer.Option(min=0, help="End after so many seconds without work; default: never.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what searches wait for (latency: remote: true), until interrupted. Several may serve one storage."""
    import yaml

    from snapgen.errors import InputError
    from studies.device import serve

    options = {}
    for text in option or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError("--option", f"{text!r:.60} sets nothing", "write KEY=VALUE")
        options[key] = yaml.safe_load(value)
    tell = (lambda _: None) if quiet else (lambda line: typer.echo(line))
    made = serve(storage, device, options, tell=tell, idle_seconds=idle)
    typer.echo(f"{made} measurements made")
