"""The report of a study: one HTML file that needs no network, and a CSV beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snapgen.errors import InputError
from snapgen.files import aside

if TYPE_CHECKING:
    from optuna import Study


def write(study: Study, out: Path, *, source: str = "") -> Path:
    """Write the report of a study, running or finished, and ``out`` with the suffix ``.csv`` beside it.

    Args:
        source: how the command line names the study, for the commands that the page gives; default: its name.

    Returns:
        ``out``.

    Raises:
        InputError: if nothing was scored yet, protocols are mixed, or the file cannot be written.
    """
    from reports import facts, page, tables

    found = facts.read(study)
    put(out, page.render(found, source=source or found.name, beside=out.parent / "artifacts"))
    put(out.with_suffix(".csv"), tables.csv(tables.candidates(found)))
    return out


def put(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a reader finds the old one or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be written").lower(), "name a writable file") from None
