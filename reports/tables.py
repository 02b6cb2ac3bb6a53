"""Tables for people and for programs: Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from archsearch.score import QUALITIES, Estimate, LatencyRecord
from reports import words
from reports.facts import Facts

if TYPE_CHECKING:
    import pandas

    from studies.trials import Candidate


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table; the first ``words`` columns to the left, the others, which hold numbers, to the right."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    lines = [[_cell(text) for text in row] for row in (header, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def csv(frame: pandas.DataFrame) -> str:
    """As CSV, quoted where needed, missing numbers empty."""
    return frame.to_csv(index=False, lineterminator="\n")


def candidates(facts: Facts) -> pandas.DataFrame:
    """A row for every candidate: all that the report knows of it, in plain units (ms, counts, bytes)."""
    import pandas

    return pandas.DataFrame([_row(facts, c) for c in facts.candidates])


def _row(facts: Facts, candidate: Candidate) -> dict[str, Any]:
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
        "architecture": words.describe(candidate.architecture),
    }
    row |= {f"knob {knob}": choice for knob, choice in facts.choices(candidate).items()}
    row |= cost.model_dump() if cost.params else {}
    row |= latency_columns(latency) if latency else {}
    if quality:
        for name in QUALITIES:
            estimate = getattr(quality, name)
            row |= quality_columns(name, estimate) if estimate else {}
        row |= quality.model_dump(include={"extractor", "protocol_hash", "training_seconds", "diverged"})
    return row


def latency_columns(record: LatencyRecord) -> dict[str, Any]:
    """A latency record by the names of its columns."""
    fields = record.model_dump(exclude={"placement"})
    return {key if key.endswith("_ms") else f"latency_{key}": value for key, value in fields.items()}


def quality_columns(name: str, estimate: Estimate) -> dict[str, Any]:
    """A quality number, its interval and its seeds by the names of their columns."""
    row = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row | {f"{name}_seed_{i}": value for i, value in enumerate(estimate.by_seed)}
