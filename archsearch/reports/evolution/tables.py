"""The tables of an evolution's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archsearch.block_latency.table import TOLERATED, BlockTable, PredictionErrors
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.rendering import formatting
from archsearch.score import LatencyRecord
from archsearch.stats.main_effects import EffectInterval
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture, BlockKind

PHASES = {"robust": "robust training", "evolve": "evolving", "final": "final training"}


class BlockCounts(NamedTuple):
    """Blocks of a stage, before and after."""

    stage: str
    transformers: tuple[int, int]
    residual: tuple[int, int]


PUBLISHED = (
    BlockCounts("Down 1, highest resolution", (2, 0), (2, 2)),
    BlockCounts("Down 2", (2, 2), (2, 2)),
    BlockCounts("Down 3", (2, 2), (2, 1)),
    BlockCounts("Middle", (1, 1), (7, 4)),
    BlockCounts("Up 3", (3, 6), (3, 2)),
    BlockCounts("Up 2", (3, 3), (3, 3)),
    BlockCounts("Up 1, highest resolution", (3, 0), (3, 3)),
)
"""SD-1.5's blocks and SnapFusion's (arXiv 2306.00980); the middle takes in the lowest level."""


def headline(evolution: Evolution) -> str:
    """From where to where, and how far from the target."""
    first, last, metric = evolution.steps[0], evolution.last, evolution.metrics[0]
    said = (
        f"{len(evolution.steps)} rounds so far." if last.round.phase != "final" else f"{len(evolution.steps)} rounds."
    )
    if first.latency and last.latency:
        ms, target = last.latency.median_ms, evolution.settings.target_ms
        start = formatting.number(first.latency.median_ms)
        said += f" From {start} to {formatting.number(ms)} ms ({last.latency.source}), "
        off = f"{formatting.percent(abs(ms / target - 1))} {'over' if ms > target else 'under'}"
        said += f"{off} the target of {target:.3g} ms."
    was, now = first.quality(metric), last.quality(metric)
    assert was is not None
    assert now is not None
    before, after = formatting.format_interval(was), formatting.format_interval(now)
    return f"{said} {evolution.label(metric)}: {before} before, {after} after."


ROUND_COLUMNS = ("Round", "Phase", "What was done", "{source} ms", "predicted ms", "{quality}", "steps", "TMACs so far")
"""Heads of `round_rows`."""


WORDS = 3
"""Columns of it that hold words."""


def round_header(evolution: Evolution) -> list[str]:
    """The heads, with where latencies come from and what quality is."""
    source = evolution.last.latency.source if evolution.last.latency else "measured"
    quality = evolution.label(evolution.metrics[0])
    told = [head.format(source=source, quality=quality) for head in ROUND_COLUMNS]
    told[4] = "by the block table, ms"
    return told


def round_rows(evolution: Evolution) -> list[list[str]]:
    """A row a round."""
    rows = []
    for step in evolution.steps:
        quality = step.quality(evolution.metrics[0])
        assert quality is not None
        rows.append(
            [
                str(step.round.number),
                PHASES[step.round.phase],
                evolution.action(step),
                milliseconds(step.latency),
                formatting.number(step.round.predicted_ms),
                formatting.format_interval(quality),
                f"{step.round.steps:,}",
                tera(evolution.spent[step.round.number]),
            ]
        )
    return rows


def milliseconds(record: LatencyRecord | None) -> str:
    """A latency with its quartiles."""
    if record is None:
        return "–"
    found = EffectInterval(record.median_ms, record.lower_quartile_ms, record.upper_quartile_ms)
    return formatting.format_interval(found) if found.high > found.low else formatting.number(found.value)


def tera(macs: float) -> str:
    """Training compute in TMACs."""
    return formatting.number(macs / 1e12)


COUNT_COLUMNS = ("Stage", "CA", "kept", "ResNet", "kept")


def counted(evolution: Evolution) -> list[BlockCounts]:
    """Of the first round's network, and of the last one's."""
    before, after = (_per_site(step.candidate.architecture) for step in (evolution.steps[0], evolution.last))

    def pair(site: str, kind: BlockKind) -> tuple[int, int]:
        return before[site, kind], after[site, kind]

    sites = [site for site, _, _ in evolution.steps[0].candidate.architecture.sites()]
    return [BlockCounts(_stage(site), pair(site, "transformer"), pair(site, "residual")) for site in sites]


def count_rows(found: Sequence[BlockCounts]) -> list[list[str]]:
    """Counts before and after with the share that is kept, and their sums."""
    sums = [
        (sum(a for a, _ in column), sum(b for _, b in column)) for column in zip(*(c[1:] for c in found), strict=True)
    ]
    return [[c.stage, *_kept(*c.transformers), *_kept(*c.residual)] for c in (*found, BlockCounts("All", *sums))]


def _kept(before: int, after: int) -> list[str]:
    return [f"{before} → {after}", formatting.percent(after / before) if before else "–"]


def _per_site(arch: Architecture) -> Counter[tuple[str, str]]:
    return Counter((block.site, block.kind) for block in block_index.blocks(arch))


def _stage(site: str) -> str:
    if site == "mid":
        return "Middle"
    way, _, level = site.rstrip("]").partition("[")
    return f"{way.capitalize()} {int(level) + 1}" + (", highest resolution" if level == "0" else "")


def table_of(attrs: Mapping[str, Any]) -> BlockTable | None:
    """The study's table of blocks, where it has one."""
    return BlockTable.model_validate(attrs["block_table"]) if attrs.get("block_table") else None


def check_lines(table: BlockTable) -> list[str]:
    """How far the table's sums are from the whole networks, in sentences."""
    fixed = table.share * table.fixed_ms
    lines = [
        f"Taken on {table.device} ({table.compute_units}, {table.source}) from {len(table.measured)} whole networks. "
        f"The first takes {formatting.number(table.whole_ms)} ms; {formatting.number(fixed)} ms are no block's."
    ]
    if table.before:
        lines.append(f"The sum of the blocks against the whole, {_checked(table.before)}.")
    if table.after:
        verb = "So it was corrected by them too" if table.corrected else "A correction by them was no better"
        lines.append(f"{verb}: each left out in turn, {_checked(table.after)}.")
    return lines


def _checked(check: PredictionErrors) -> str:
    within = sum(abs(e) <= TOLERATED for e in check.errors)
    return (
        f"{len(check.errors)} random sub-networks that it does not know: off by {formatting.percent(check.median)} "
        f"(median), by {formatting.percent(check.largest)} at most; "
        f"{within} of {len(check.errors)} within {formatting.percent(TOLERATED)}"
    )


def round_check(evolution: Evolution) -> str:
    """How far the table is from the rounds' own latencies."""
    pairs = [(s.round.predicted_ms, s.latency.median_ms) for s in evolution.steps if s.latency]
    errors = [p / ms - 1 for p, ms in pairs]
    if not errors:
        return ""
    return f"Of this study's {len(errors)} rounds it is off by {formatting.percent(max(map(abs, errors)))} at most."
