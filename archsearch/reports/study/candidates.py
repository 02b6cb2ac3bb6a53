"""The candidates one by one: as rows of the page's table, and as what its panel shows."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Any

from archsearch.reports.rendering import architecture_text, formatting
from archsearch.reports.rendering.tables import latency_columns, quality_columns
from archsearch.reports.study.data import StudyData, diverged, title
from archsearch.score import QUALITY_METRICS
from archsearch.studies.search.candidates import Candidate

if TYPE_CHECKING:
    import pandas

    from archsearch.studies.search.candidates import Candidate


def display_order(facts: StudyData) -> list[Candidate]:
    """Candidates in the order in which one wants to look at them: best, front, named, the others."""
    return sorted(
        facts.candidates,
        key=lambda c: (c.number != facts.best.number, c.number not in facts.front, c.name is None, c.slot),
    )


def table(facts: StudyData) -> dict[str, Any]:
    columns = [(name, formatting.axis(name, facts.extractor)) for name in facts.measures]
    return {
        "columns": columns,
        "knobs": [f.name for f in facts.factors],
        "rows": [_row(facts, c) for c in facts.candidates],
    }


def _row(facts: StudyData, candidate: Candidate) -> dict[str, Any]:
    cells = []
    for name in facts.measures:
        found = facts.amount(candidate, name) if candidate.score.cost.params else None
        cells.append(
            (found.value, _bare(formatting.format_value(found, name, ends=True), name)) if found else (None, "–")
        )
    return {
        "number": candidate.number,
        "title": title(candidate),
        "id": candidate.architecture.id,
        "departures": [f"{knob}: {choice}" for knob, choice in facts.departures(candidate).items()],
        "choices": [facts.choices(candidate).get(f.name, "–") for f in facts.factors],
        "indices": [candidate.point.get(f.name, -1) for f in facts.factors],
        "cells": cells,
        "state": state_of(facts, candidate),
        "scored": candidate in facts.scored,
        "front": candidate.number in facts.front,
        "best": candidate.number == facts.best.number,
    }


def _bare(text: str, name: str) -> str:
    """Without the unit, which the column's head has."""
    return text.replace(f"{formatting.GAP}{formatting.unit(name)}", "", 1) if formatting.unit(name) else text


def state_of(facts: StudyData, candidate: Candidate) -> str:
    """In words: on the front, scored, reused, outside the limits (which, by how much), failed (why), running."""
    if candidate.number in facts.front:
        return "on the front"
    if candidate.reused_from is not None:
        return f"same as trial {candidate.reused_from}"
    if diverged(candidate):
        return "diverged"
    if candidate.infeasible:
        return f"outside: {candidate.infeasible}"
    return f"failed: {candidate.error}" if candidate.error else candidate.state


def details(facts: StudyData, candidate: Candidate) -> dict[str, Any]:
    known = candidate.score.cost.params > 0
    found = [(n, i) for n in facts.measures if known and (i := facts.amount(candidate, n))]
    numbers = [(facts.label(n), formatting.format_value(i, n, ends=True)) for n, i in found]
    said = architecture_text.describe(candidate.architecture)
    lines = [f"{label}: {text}" for label, text in numbers[:4]] + textwrap.wrap(said, 58)
    hover = [f"<b>{html.escape(title(candidate))}</b>", *map(html.escape, lines)]
    return {
        "title": title(candidate),
        "id": candidate.architecture.id,
        "state": state_of(facts, candidate),
        "words": said,
        "differs": architecture_text.differences(candidate.architecture, facts.base),
        "numbers": numbers,
        "hover": "<br>".join(hover),
    }


def candidates(facts: StudyData) -> pandas.DataFrame:
    """A row for every candidate: all that the report knows of it, in plain units (ms, counts, bytes)."""
    import pandas

    return pandas.DataFrame([_cells(facts, c) for c in facts.candidates])


def _cells(facts: StudyData, candidate: Candidate) -> dict[str, Any]:
    cost, latency, quality = candidate.score.cost, candidate.score.latency, candidate.score.quality
    row: dict[str, Any] = {
        "trial": candidate.number,
        "slot": candidate.slot,
        "name": candidate.name,
        "architecture_id": candidate.architecture.id,
        "state": candidate.state,
        "front": candidate.number in facts.front,
        "recommended": candidate.number == facts.best.number,
        "infeasible": candidate.infeasible,
        "reused_from": candidate.reused_from,
        "error": candidate.error,
        "seconds": round(candidate.seconds, 3),
        "architecture": architecture_text.describe(candidate.architecture),
    }
    row |= {f"knob {knob}": choice for knob, choice in facts.choices(candidate).items()}
    row |= cost.model_dump() if cost.params else {}
    row |= latency_columns(latency) if latency else {}
    if quality:
        for name in QUALITY_METRICS:
            estimate = getattr(quality, name)
            row |= quality_columns(name, estimate) if estimate else {}
        row |= quality.model_dump(include={"extractor", "protocol_hash", "training_seconds", "diverged"})
    return row
