"""The report of a study: one HTML file that needs no network, and tables beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write_text

if TYPE_CHECKING:
    from optuna import Study


def write_report(study: Study, out: Path, *, source: str = "", beside: Study | None = None) -> Path:
    """Write the report of a study, running or finished, and ``out`` with the suffix ``.csv`` beside it.

    Of an evolving study there is a ``.md`` too, with its rounds.

    Args:
        source: how the command line names the study, for the commands that the page gives; default: its name.
        beside: another study, which an evolving one is compared with.

    Returns:
        ``out``.

    Raises:
        InputError: if nothing was scored yet, protocols are mixed, ``beside`` is given for a study that does not
            evolve, or a file cannot be written.
    """
    from archsearch.reports.evolution.data import load_evolution
    from archsearch.reports.evolution.section import EvolutionSection
    from archsearch.reports.rendering import tables
    from archsearch.reports.study import candidates, page
    from archsearch.reports.study.data import load_study_data

    found = load_study_data(study)
    rounds = load_evolution(study, found)
    if beside is not None and rounds is None:
        raise InputError(found.name, "does not evolve", "name a study of archsearch evolve, or leave out --beside")
    evolved = EvolutionSection.of(rounds, load_study_data(beside) if beside is not None else None) if rounds else None
    atomic_write_text(
        out, page.render(found, source=source or found.name, beside=out.parent / "artifacts", evolved=evolved)
    )
    if evolved:
        atomic_write_text(out.with_suffix(".md"), evolved.markdown())
    atomic_write_text(out.with_suffix(".csv"), tables.csv(candidates.candidates(found)))
    return out
