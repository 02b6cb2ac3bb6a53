"""The command line: ``archsearch COMMAND``.

Commands: search, report, best, audit, ablate, evolve, score, cost, latency, convert, train, compare, generate, export,
prune-decoder, space show.

Heavy imports are made inside the commands, so that ``--help`` and a mistyped name answer at once.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from archsearch.cli import (
    ablating,
    converting,
    costing,
    evolving,
    measuring,
    pruning,
    serving,
    studying,
    tabling,
    timing,
    training,
    using,
)
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
app.add_typer(studying.app)
app.add_typer(ablating.app)
app.add_typer(evolving.app)
app.add_typer(measuring.app)
app.add_typer(costing.app)
timing.latency_app.add_typer(tabling.app)
app.add_typer(timing.app)
app.add_typer(serving.app)
app.add_typer(converting.app)
app.add_typer(training.app)
app.add_typer(using.app)
app.add_typer(pruning.app)


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
    # Processes that were launched together on a machine find the same; one of them says it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"archsearch: {' '.join(line.split())}\n")
    sys.exit(status)
