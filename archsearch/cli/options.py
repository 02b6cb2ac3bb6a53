"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

LARGEST_LATENT = 4096
LONGEST_CONTEXT = 65536

ARCHITECTURE = "A preset, a JSON or YAML file, SPACE:base, SPACE/REFERENCE, STUDY:best or STUDY:TRIAL"
"""How an architecture may be named (`archsearch.studies.lookup.find_architecture`)."""

LatentSize = Annotated[int, typer.Option(min=1, max=LARGEST_LATENT, help="Height and width of the latent.")]
ContextTokens = Annotated[int, typer.Option(min=1, max=LONGEST_CONTEXT, help="Length of the context in tokens.")]
Study = Annotated[str, typer.Argument(help="A shipped study (emoji, emoji_large, snapgen) or a YAML file.")]
BegunStudy = Annotated[str, typer.Argument(help="A shipped study, a YAML file, or the name of a run under runs/.")]
Storage = Annotated[str | None, typer.Option(help="Where the study is, if not where its YAML says: an Optuna URL.")]
TABLE = "A shipped table, or a file that archsearch tabulate wrote."
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only results and warnings.")]
