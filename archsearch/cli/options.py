"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

LARGEST_LATENT = 4096
LONGEST_CONTEXT = 65536

ARCHITECTURE = "A preset, a JSON or YAML file, SPACE:base, SPACE/REFERENCE, STUDY:best or STUDY:TRIAL"
"""How an architecture may be named (`archsearch.studies.lookup.find_architecture`)."""

_OF_THE_STUDY = "default: the study's, for STUDY:…, else"
LatentSize = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST_LATENT, help=f"Height and width of the latent; {_OF_THE_STUDY} 128."),
]
ContextTokens = Annotated[
    int | None,
    typer.Option(min=1, max=LONGEST_CONTEXT, help=f"Length of the context in tokens; {_OF_THE_STUDY} 77."),
]
DEVICES = "host, coreml, coreai, iphone, or predicted: and a profile's name or a fitted JSON file"
Device = Annotated[str | None, typer.Option(help=f"{DEVICES}; {_OF_THE_STUDY} host.")]
Study = Annotated[str, typer.Argument(help="A shipped study (emoji, emoji_large, snapgen) or a YAML file.")]
BegunStudy = Annotated[str, typer.Argument(help="A shipped study, a YAML file, or the name of a run under runs/.")]
Storage = Annotated[str | None, typer.Option(help="Where the study is, if not where its YAML says: an Optuna URL.")]
TABLE = "A shipped table, or a file that archsearch tabulate wrote."
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only results and warnings, and of long work a line a minute.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how long it takes, from a few steps or what is done.")]
On = Annotated[str | None, typer.Option(help="With --dry-run: plan for machines one does not have, e.g. 8xH100.")]
Retry = Annotated[bool, typer.Option("--retry", help="Try again what was given up: candidates, and measurements.")]
