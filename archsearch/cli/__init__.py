"""The command line: ``archsearch COMMAND``.

Heavy imports are made inside the commands, so that ``--help`` and a mistyped name answer at once.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.core import TyperGroup

from archsearch.cli import convert, doctor, inspect, latency, latency_blocks, pipeline, schema, study, train
from archsearch.studies.signals import terminable
from snapgen.errors import InputError, first_line

if TYPE_CHECKING:
    from typer._click.core import Context

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class _Ordered(TyperGroup):
    def list_commands(self, ctx: Context) -> list[str]:
        from archsearch.installation import COMMANDS

        return sorted(super().list_commands(ctx), key=[*COMMANDS].index)


app = typer.Typer(
    name="archsearch",
    cls=_Ordered,
    help="Search text-to-image diffusion U-Nets for quality and measured latency.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
latency.latency_app.add_typer(latency_blocks.app)
for module in (study, inspect, latency, convert, train, pipeline, doctor, schema):
    app.add_typer(module.app)


def _print_version(wanted: bool) -> None:
    from archsearch.machine import installed as version

    if wanted:
        libraries = ", ".join(f"{name} {version(name) or 'missing'}" for name in ("torch", "optuna"))
        typer.echo(f"archsearch {version('archsearch') or 'of a checkout'} ({libraries})")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of archsearch itself."""


def main() -> NoReturn:
    """Entry point: every mistake of the user's is a line on standard error, and exit status 2."""
    if os.environ.get("RANK", "0") != "0":  # of processes that were launched together, one prints
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the process lives
    try:
        with terminable():  # whatever is half-written is deleted
            status = app(prog_name="archsearch", standalone_mode=False)
    except InputError as error:
        _fail(str(error), BAD_INPUT, *map(str, error.others))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "archsearch"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help", BAD_INPUT)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeErrors
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        _fail(f"out of memory ({first_line(error)}); give it less to do at a time, or use a machine with more", FAILED)
    except BrokenPipeError:
        # The reader of our output (head, a pager) has gone; that is no mistake.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        from archsearch.machine_faults import machine_fault

        if (fault := machine_fault(error)) is None:
            raise
        _fail(str(fault), FAILED)
    if status == INTERRUPTED:  # typer returns the status of an interrupt rather than raise it
        _fail("interrupted; run the same command again: studies and trainings resume", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(line: str, status: int, *further: str) -> NoReturn:
    # Processes that were launched together on a machine find the same; one of them says it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write("".join(f"archsearch: {' '.join(text.split())}\n" for text in (line, *further)))
    sys.exit(status)
