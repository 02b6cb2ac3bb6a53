"""Write the report of a study: one HTML file that needs no network, a CSV and, where there is one, a Markdown file.

A table of its scores is written here, too, as it is another file that a study is handed on by.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write_texts

if TYPE_CHECKING:
    from optuna import Study


def write_report(study: Study, out: Path, *, source: str = "", compare_with: Study | None = None) -> Path:
    """Write the HTML report of a study, running or finished, and a CSV with the same stem.

    A Markdown file with the same stem has the rounds of a study that evolves a network, and how far the space's
    references are from the other candidates; without either there is none.

    Args:
        study: the study.
        out: the HTML file; or a table (``.jsonl``), which has the scores alone, for another study to start from.
        source: name of the study on the command line, for the commands that the page shows; default: its own name.
        compare_with: another study to show beside this one.

    Returns:
        ``out``.

    Raises:
        InputError: if ``out`` ends in neither .html nor .jsonl, nothing has been scored yet, candidates of several
            protocols are mixed, ``compare_with`` has no objective of the study or another protocol, or a file cannot be
            written.
    """
    from archsearch.reports.evolution.data import load_evolution
    from archsearch.reports.evolution.section import EvolutionSection
    from archsearch.reports.rendering import tables
    from archsearch.reports.study import candidates, page
    from archsearch.reports.study.data import load_study_data
    from archsearch.reports.study.references import ReferenceSection
    from archsearch.reports.study.side_by_side import SideBySide
    from archsearch.studies.search.known_scores import is_table, write_table

    if is_table(out):
        if compare_with is not None:
            raise InputError("--compare-with", f"is for a report, and {out} is a table of scores", "leave one out")
        write_table(study, out)
        return out
    if out.suffix.lower() not in (".html", ".htm"):  # the files beside it have its stem
        raise InputError(out, "is not the name of an HTML file", "end it in .html; the CSV is written beside it")
    data = load_study_data(study)
    evolution = load_evolution(data)
    other = load_study_data(compare_with) if compare_with is not None else None
    section = EvolutionSection.create(evolution, other) if evolution else None
    beside = SideBySide.create(data, other) if other and not evolution else None
    html = page.render(
        data, source=source or data.name, assets_dir=out.parent / "artifacts", evolution=section, beside=beside
    )
    pages = {out: html, out.with_suffix(".csv"): tables.csv(candidates.candidates(data))}
    sections = (section, beside, ReferenceSection(data))
    if markdown := "\n".join(text for part in sections if part and (text := part.markdown())):
        pages[out.with_suffix(".md")] = markdown
    atomic_write_texts(pages)
    return out
