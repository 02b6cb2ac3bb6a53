"""The command doctor: what is installed, what can be measured here, and what each command still needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from archsearch.cli.options import Json
from archsearch.cli.output import print_json, print_table

if TYPE_CHECKING:
    from archsearch.installation import Check

INCOMPLETE = 1

app = typer.Typer()


@app.command(epilog="Example: archsearch doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what is installed, which devices are here, and what each command still needs; status 1 if it is a package."""
    from archsearch.installation import inspect_installation

    found = inspect_installation()
    if as_json:
        print_json({"complete": found.complete, **asdict(found)})
    else:
        _print("Required packages", found.packages)
        _print("Extras", found.extras)
        _print("External tools", found.tools)
        _print("Devices of torch", found.torch_devices)
        _print("Latency backends", found.latency_backends)
        _print("Commands", found.commands)
    if not found.complete:
        raise typer.Exit(INCOMPLETE)


def _print(title: str, checks: Sequence[Check]) -> None:
    rows = [(check.name, "yes" if check.ok else "no", check.detail, check.remedy) for check in checks]
    print_table(f"\n{title}", ("", "", "", ""), rows, numbers=False)
