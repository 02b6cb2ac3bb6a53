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

from archsearch.cli import convert, inspect, latency, latency_blocks, pipeline, study, train
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
app.add_typer(study.app)
app.add_typer(inspect.app)
latency.latency_app.add_typer(latency_blocks.app)
app.add_typer(latency.app)
app.add_typer(convert.app)
app.add_typer(train.app)
app.add_typer(pipeline.app)


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
