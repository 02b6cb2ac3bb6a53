"""Tables of the section on an evolving study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archsearch.block_latency.table import TOLERATED, BlockTable, PredictionErrors
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.rendering import formatting
from archsearch.reports.rendering.tables import Table
from archsearch.score import LatencyRecord, interval_name
from snapgen.architecture import block_index
from snapgen.architecture.schema import BlockKind

PHASES = {"robust": "robust training", "evolve": "evolving", "final": "final training"}


class BlockCounts(NamedTuple):
    """Numbers of transformers and residual blocks of a level, before and after the evolution."""

    level: str
    transformers: tuple[int, int]
    residual: tuple[int, int]


PUBLISHED_COUNTS = (
    BlockCounts("Down 1, highest resolution", (2, 0), (2, 2)),
    BlockCounts("Down 2", (2, 2), (2, 2)),
    BlockCounts("Down 3", (2, 2), (2, 1)),
    BlockCounts("Middle", (1, 1), (7, 4)),
    BlockCounts("Up 3", (3, 6), (3, 2)),
    BlockCounts("Up 2", (3, 3), (3, 3)),
    BlockCounts("Up 1, highest resolution", (3, 0), (3, 3)),
)
"""Blocks of SD-1.5 and of SnapFusion (arXiv 2306.00980); the middle includes the lowest level."""


def headline(evolution: Evolution) -> str:
    """Latency and quality of the first and the last round, and the distance from the target, as text."""
    first, last, metric = evolution.rounds[0], evolution.last, evolution.metrics[0]
    text = f"{len(evolution.rounds)} rounds{' so far' if last.round.phase != 'final' else ''}."
    if first.latency and last.latency:
        ms, target = last.latency.median_ms, evolution.settings.target_ms
        start = formatting.number(first.latency.median_ms)
        text += f" From {start} to {format_latency(last.latency)} ms ({last.latency.source}; "
        text += f"[a, b]: {last.latency.interval_name}), "
        distance = f"{formatting.percent(abs(ms / target - 1))} {'above' if ms > target else 'below'}"
        text += f"{distance} the target of {target:.3g} ms."
    first_quality, last_quality = first.quality(metric), last.quality(metric)
    assert first_quality is not None
    assert last_quality is not None
    before, after = formatting.format_interval(first_quality), formatting.format_interval(last_quality)
    return f"{text} {evolution.label(metric)}: {before} before, {after} after."


def latency_column(evolution: Evolution) -> str:
    """Head of a column of latencies."""
    records = [r.latency for r in evolution.rounds if r.latency]
    sources = " or ".join(sorted({record.source for record in records})) or "measured"
    return formatting.with_interval(f"{sources} ms", interval_name("latency_ms", records))


def rounds(evolution: Evolution) -> Table:
    """One row per round."""
    rows, metric = [], evolution.metrics[0]
    for result in evolution.rounds:
        quality = result.quality(metric)
        assert quality is not None
        rows.append(
            [
                str(result.round.number),
                PHASES[result.round.phase],
                evolution.action(result),
                format_latency(result.latency),
                formatting.number(result.round.predicted_ms),
                formatting.format_interval(quality),
                f"{result.round.steps:,}",
                format_tera(evolution.cumulative_macs[result.round.number]),
            ]
        )
    numbers = (latency_column(evolution), "ms by the block table")
    quality_column = formatting.with_interval(evolution.label(metric), interval_name(metric))
    header = ("Round", "Phase", "Action", *numbers, quality_column, "steps", "TMACs so far")
    return Table(header, rows, text_columns=3)


def format_latency(record: LatencyRecord | None) -> str:
    """Format a latency in milliseconds with its interval."""
    if record is None:
        return "–"
    interval = record.estimate
    return formatting.format_interval(interval) if interval.high > interval.low else formatting.number(interval.value)


def format_tera(macs: float) -> str:
    """Format training compute in TMACs (10¹² MACs)."""
    return formatting.number(macs / 1e12)


def block_counts(evolution: Evolution) -> list[BlockCounts]:
    """Count the blocks of each level in the networks of the first and the last round."""
    first_and_last = (evolution.rounds[0].candidate.architecture, evolution.last.candidate.architecture)
    before, after = (Counter((b.site, b.kind) for b in block_index.blocks(arch)) for arch in first_and_last)

    def pair(site: str, kind: BlockKind) -> tuple[int, int]:
        return before[site, kind], after[site, kind]

    sites = [site for site, _, _ in evolution.rounds[0].candidate.architecture.named_levels()]
    return [BlockCounts(_level_name(site), pair(site, "transformer"), pair(site, "residual")) for site in sites]


def counts(levels: Sequence[BlockCounts]) -> Table:
    """Block counts before and after, and the fraction kept: one row per level and one of totals."""
    totals = [
        (sum(a for a, _ in column), sum(b for _, b in column)) for column in zip(*(c[1:] for c in levels), strict=True)
    ]
    rows = (*levels, BlockCounts("All", *totals))
    cells = [[c.level, *_before_and_after(*c.transformers), *_before_and_after(*c.residual)] for c in rows]
    # CA are transformers with cross-attention, in the words of the paper.
    return Table(("Level", "CA", "kept", "ResNet", "kept"), cells)


def _before_and_after(before: int, after: int) -> list[str]:
    return [f"{before} → {after}", formatting.percent(after / before) if before else "–"]


def _level_name(site: str) -> str:
    if site == "mid":
        return "Middle"
    side, _, level = site.rstrip("]").partition("[")
    return f"{side.capitalize()} {int(level) + 1}" + (", highest resolution" if level == "0" else "")


def load_block_table(attrs: Mapping[str, Any]) -> BlockTable | None:
    """The study's table of block latencies; None if it has none."""
    return BlockTable.model_validate(attrs["block_table"]) if attrs.get("block_table") else None


def check_lines(table: BlockTable) -> list[str]:
    """Sentences on how the block table was measured and how accurately it predicts whole networks."""
    fixed_ms = formatting.number(table.fixed_ms)
    lines = [
        f"Fitted to {len(table.measured)} whole networks on {table.device} ({table.compute_units}, {table.source}). "
        f"The first network takes {formatting.number(table.whole_ms)} ms, of which {fixed_ms} ms are "
        "outside the blocks."
    ]
    if table.before:
        lines.append(f"Sums of block latencies against whole networks, {_errors(table.before)}.")
    if table.after:
        if table.correction:
            fit = "The table was therefore fitted to these sub-networks too"
        else:
            fit = "A fit to these sub-networks too was not more accurate and was not used"
        lines.append(f"{fit}: by leave-one-out, {_errors(table.after)}.")
    return lines


def _errors(check: PredictionErrors) -> str:
    within = sum(abs(e) <= TOLERATED for e in check.errors)
    return (
        f"{len(check.errors)} random sub-networks that it was not fitted to: the error is "
        f"{formatting.percent(check.median)} (median), {formatting.percent(check.largest)} (maximum); "
        f"{within} of {len(check.errors)} within {formatting.percent(TOLERATED)}"
    )


def round_check(evolution: Evolution) -> str:
    """Sentence on the error of the block table for the latencies of the rounds; empty without latencies."""
    pairs = [(r.round.predicted_ms, r.latency.median_ms) for r in evolution.rounds if r.latency]
    errors = [p / ms - 1 for p, ms in pairs]
    if not errors:
        return ""
    return (
        f"For the {len(errors)} rounds of this study the maximum error is {formatting.percent(max(map(abs, errors)))}."
    )
