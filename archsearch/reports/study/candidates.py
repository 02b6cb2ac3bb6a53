"""The candidates one by one: rows of the page's table, contents of its details panel, and rows of the CSV."""

from __future__ import annotations

import html
import textwrap
from typing import TYPE_CHECKING, Any

from archsearch.reports.rendering import architecture_text, formatting
from archsearch.reports.rendering.tables import latency_columns, quality_columns
from archsearch.reports.study.data import StudyData, diverged, title
from archsearch.score import QUALITY_METRICS
from archsearch.studies.storage.record import Candidate

if TYPE_CHECKING:
    import pandas


def display_order(study: StudyData) -> list[Candidate]:
    """Candidates in the order of the page's selector: recommended, front, named designs, others."""
    return sorted(
        study.candidates,
        key=lambda c: (c.number != study.best.number, c.number not in study.front, c.name is None, c.slot),
    )


def table(study: StudyData) -> dict[str, Any]:
    """Columns and rows of the page's table of all candidates."""
    columns = [(name, study.column(name)) for name in study.measures]
    return {
        "columns": columns,
        "knobs": [f.name for f in study.factors],
        "rows": [_row(study, c) for c in study.candidates],
    }


def _row(study: StudyData, candidate: Candidate) -> dict[str, Any]:
    cells = []
    for name in study.measures:
        value = study.value_of(candidate, name) if candidate.score.cost.params else None
        cells.append(
            (value.value, _without_unit(formatting.format_value(value, name, ends=True), name))
            if value
            else (None, "–")
        )
    return {
        "number": candidate.number,
        "title": title(candidate),
        "id": candidate.architecture.id,
        "differences": [f"{knob}: {choice}" for knob, choice in study.differences_from_base(candidate).items()],
        "choices": [study.choices(candidate).get(f.name, "–") for f in study.factors],
        "indices": [candidate.point.get(f.name, -1) for f in study.factors],
        "cells": cells,
        "state": state_of(study, candidate),
        "scored": candidate in study.scored,
        "front": candidate.number in study.front,
        "best": candidate.number == study.best.number,
    }


def _without_unit(text: str, name: str) -> str:
    """Drop the unit, which is in the column's header."""
    return text.replace(f"{formatting.NBSP}{formatting.unit(name)}", "", 1) if formatting.unit(name) else text


def state_of(study: StudyData, candidate: Candidate) -> str:
    """State of a candidate as text: on the front, reused, diverged, or why it has no score, or else."""
    source = "" if candidate.reused_study is None else f"quality of {candidate.reused_study}"
    if candidate.number in study.front:
        return f"on the front, {source}" if source else "on the front"
    if source:
        return source
    if candidate.reused_from is not None:
        return f"same as trial {candidate.reused_from}"
    if diverged(candidate):
        return "diverged"
    if candidate.state == "paused":
        return _pruned(study, candidate)
    if candidate.infeasible:
        return f"infeasible: {candidate.infeasible}"
    kind = "rejected" if candidate.rejected else candidate.state
    return f"{kind}: {candidate.error}" if candidate.error else kind


def _pruned(study: StudyData, candidate: Candidate) -> str:
    chance = study.chances.get(candidate.number)
    likely = "" if chance is None else f": {formatting.percent(chance)} likely to be on the front"
    return f"pruned at step {candidate.rungs[-1].step}{likely}"


def details(study: StudyData, candidate: Candidate) -> dict[str, Any]:
    """Contents of the details panel and of the hover text for one candidate."""
    has_cost = candidate.score.cost.params > 0
    values = [(name, value) for name in study.measures if has_cost and (value := study.value_of(candidate, name))]
    shown = {name: formatting.format_value(value, name, ends=True) for name, value in values}
    numbers = [(study.label(name, with_interval=True), text) for name, text in shown.items()]
    if candidate.score.quality:
        numbers.append(("training seeds", str(candidate.runs)))
    description = architecture_text.describe(candidate.architecture)
    lines = [f"{study.label(name)}: {text}" for name, text in [*shown.items()][:4]] + textwrap.wrap(description, 58)
    hover = [f"<b>{html.escape(title(candidate))}</b>", *map(html.escape, lines)]
    return {
        "title": title(candidate),
        "id": candidate.architecture.id,
        "state": state_of(study, candidate),
        "description": description,
        "differences": architecture_text.differences(candidate.architecture, study.base),
        "numbers": numbers,
        "hover": "<br>".join(hover),
    }


def candidates(study: StudyData) -> pandas.DataFrame:
    """Data frame with one row per candidate and all its numbers in base units (ms, counts, bytes)."""
    import pandas

    return pandas.DataFrame([_frame_row(study, c) for c in study.candidates])


def _frame_row(study: StudyData, candidate: Candidate) -> dict[str, Any]:
    cost, latency, quality = candidate.score.cost, candidate.score.latency, candidate.score.quality
    row: dict[str, Any] = {
        "trial": candidate.number,
        "slot": candidate.slot,
        "name": candidate.name,
        "architecture_id": candidate.architecture.id,
        "state": candidate.state,
        "front": candidate.number in study.front,
        "recommended": candidate.number == study.best.number,
        "infeasible": candidate.infeasible,
        "rung": candidate.rungs[-1].step if candidate.state == "paused" else None,
        "front_probability": study.chances.get(candidate.number),
        "reused_from": candidate.reused_from if candidate.reused_study is None else candidate.reused_study,
        "runs": candidate.runs,
        "error": candidate.error,
        "seconds": round(candidate.seconds, 3),
        "architecture": architecture_text.describe(candidate.architecture),
    }
    row |= {f"knob {knob}": choice for knob, choice in study.choices(candidate).items()}
    row |= cost.model_dump() if cost.params else {}
    row |= latency_columns(latency) if latency else {}
    if quality:
        for name in QUALITY_METRICS:
            estimate = getattr(quality, name)
            row |= quality_columns(name, estimate) if estimate else {}
        row |= quality.model_dump(include={"extractor", "protocol_hash", "proxy", "training_seconds", "diverged"})
    return row
