"""The report of an evolving study: its rounds, its final network beside the published one, its table of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from archsearch.block_table import TOLERATED, BlockTable, Check
from archsearch.score import QUALITIES, Estimate, LatencyRecord, metric_label
from reports import amounts
from reports.effects import Interval
from reports.facts import Facts
from snapgen import subnets
from snapgen.arch import Architecture, Kind
from snapgen.subnets import Block
from studies.evolution import ATTRIBUTE, EvolveSettings, Round
from studies.trials import Candidate

if TYPE_CHECKING:
    from optuna import Study

PHASES = {"robust": "robust training", "evolve": "evolving", "final": "final training"}

NEGATED = {"retrieval": "Text–image cosine", "clip_score": "CLIP score"}
"""Metrics of `studies.gauge` of which more is better, taken negated."""


class Counts(NamedTuple):
    """Blocks of a stage, before and after."""

    stage: str
    transformers: tuple[int, int]
    residual: tuple[int, int]


PUBLISHED = (
    Counts("Down 1, highest resolution", (2, 0), (2, 2)),
    Counts("Down 2", (2, 2), (2, 2)),
    Counts("Down 3", (2, 2), (2, 1)),
    Counts("Middle", (1, 1), (7, 4)),
    Counts("Up 3", (3, 6), (3, 2)),
    Counts("Up 2", (3, 3), (3, 3)),
    Counts("Up 1, highest resolution", (3, 0), (3, 3)),
)
"""SD-1.5's blocks and SnapFusion's (arXiv 2306.00980); the middle takes in the lowest level."""


@dataclass(frozen=True)
class Step:
    """A round and the trial that it was."""

    round: Round
    candidate: Candidate

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Of its network, in the order of the forward pass."""
        return subnets.blocks(self.candidate.architecture)

    @property
    def latency(self) -> LatencyRecord | None:
        """Of its network, as the study's device gave it."""
        return self.candidate.score.latency

    def quality(self, metric: str) -> Estimate | None:
        """By the round's own metric, or one of the score's."""
        if metric == self.round.metric:
            return self.round.quality
        return getattr(self.candidate.score.quality, metric, None) if metric in QUALITIES else None


@dataclass(frozen=True)
class Evolution:
    """The rounds of a study, in their order; at least one."""

    facts: Facts
    steps: tuple[Step, ...]

    @property
    def settings(self) -> EvolveSettings:
        """How it evolves."""
        return EvolveSettings.model_validate(self.facts.attrs["settings"]["evolve"])

    @property
    def last(self) -> Step:
        """The round that it ended with, so far."""
        return self.steps[-1]

    def parent(self, step: Step) -> Step | None:
        """The round that one came from."""
        return next((s for s in self.steps if s.round.number == step.round.parent), None)

    @cached_property
    def spent(self) -> dict[int, float]:
        """Training MACs of all rounds up to each, by its number: of those, too, that it does not come from."""
        total, found = 0.0, {}
        for step in self.steps:
            parent = self.parent(step)
            total += step.round.training_macs - (parent.round.training_macs if parent else 0)
            found[step.round.number] = total
        return found

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """By which rounds can be drawn: their own, then those that the study minimises."""
        wanted = (self.last.round.metric, *(n for n in self.facts.objectives if n in QUALITIES))
        return tuple(dict.fromkeys(n for n in wanted if all(s.quality(n) for s in self.steps)))

    def label(self, metric: str) -> str:
        """A metric's name for people; negated ones say so."""
        name, _, where = metric.partition(":")
        if name in NEGATED:
            return f"{NEGATED[name]}{f' ({where})' if where else ''}, negated"
        found = metric_label(metric, self.facts.extractor)
        return found[0].upper() + found[1:]

    def action(self, step: Step) -> str:
        """What led to a round, in words."""
        parent = self.parent(step)
        names = {b.name: b.label for b in parent.blocks} if parent else {}
        acts = (("removed", step.round.removed), ("copied", step.round.copied))
        said = [f"{verb} {', '.join(names.get(name, name) for name in blocks)}" for verb, blocks in acts if blocks]
        if not said:
            said = ["trained with block dropout" if step.round.phase == "robust" else "trained on"]
        beginning = f"from round {step.round.parent}: " if parent and step.round.parent != step.round.number - 1 else ""
        return beginning + "; ".join(said)


def read(study: Study, facts: Facts) -> Evolution | None:
    """The rounds of a study; None if it has none."""
    rounds = {
        t.number: Round.model_validate(t.user_attrs[ATTRIBUTE])
        for t in study.get_trials(deepcopy=False)
        if ATTRIBUTE in t.user_attrs
    }
    steps = [Step(rounds[c.number], c) for c in facts.candidates if c.number in rounds and c.state == "scored"]
    return Evolution(facts, tuple(sorted(steps, key=lambda s: s.round.number))) if steps else None


def headline(evolution: Evolution) -> str:
    """From where to where, and how far from the target."""
    first, last, metric = evolution.steps[0], evolution.last, evolution.metrics[0]
    said = (
        f"{len(evolution.steps)} rounds so far." if last.round.phase != "final" else f"{len(evolution.steps)} rounds."
    )
    if first.latency and last.latency:
        ms, target = last.latency.median_ms, evolution.settings.target_ms
        said += f" From {amounts.number(first.latency.median_ms)} to {amounts.number(ms)} ms ({last.latency.source}), "
        off = f"{amounts.percent(abs(ms / target - 1))} {'over' if ms > target else 'under'}"
        said += f"{off} the target of {target:.3g} ms."
    was, now = first.quality(metric), last.quality(metric)
    assert was is not None
    assert now is not None
    return f"{said} {evolution.label(metric)}: {amounts.bracketed(was)} before, {amounts.bracketed(now)} after."


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
                amounts.number(step.round.predicted_ms),
                amounts.bracketed(quality),
                f"{step.round.steps:,}",
                tera(evolution.spent[step.round.number]),
            ]
        )
    return rows


def milliseconds(record: LatencyRecord | None) -> str:
    """A latency with its quartiles."""
    if record is None:
        return "–"
    found = Interval(record.median_ms, record.lower_quartile_ms, record.upper_quartile_ms)
    return amounts.bracketed(found) if found.high > found.low else amounts.number(found.value)


def tera(macs: float) -> str:
    """Training compute in TMACs."""
    return amounts.number(macs / 1e12)


COUNT_COLUMNS = ("Stage", "CA", "kept", "ResNet", "kept")


def counted(evolution: Evolution) -> list[Counts]:
    """Of the first round's network, and of the last one's."""
    before, after = (_per_site(step.candidate.architecture) for step in (evolution.steps[0], evolution.last))

    def pair(site: str, kind: Kind) -> tuple[int, int]:
        return before[site, kind], after[site, kind]

    sites = [site for site, _, _ in evolution.steps[0].candidate.architecture.sites()]
    return [Counts(_stage(site), pair(site, "transformer"), pair(site, "residual")) for site in sites]


def count_rows(found: Sequence[Counts]) -> list[list[str]]:
    """Counts before and after with the share that is kept, and their sums."""
    sums = [
        (sum(a for a, _ in column), sum(b for _, b in column)) for column in zip(*(c[1:] for c in found), strict=True)
    ]
    return [[c.stage, *_kept(*c.transformers), *_kept(*c.residual)] for c in (*found, Counts("All", *sums))]


def _kept(before: int, after: int) -> list[str]:
    return [f"{before} → {after}", amounts.percent(after / before) if before else "–"]


def _per_site(arch: Architecture) -> Counter[tuple[str, str]]:
    return Counter((block.site, block.kind) for block in subnets.blocks(arch))


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
        f"The first takes {amounts.number(table.whole_ms)} ms; {amounts.number(fixed)} ms are no block's."
    ]
    if table.before:
        lines.append(f"The sum of the blocks against the whole, {_checked(table.before)}.")
    if table.after:
        verb = "So it was corrected by them too" if table.corrected else "A correction by them was no better"
        lines.append(f"{verb}: each left out in turn, {_checked(table.after)}.")
    return lines


def _checked(check: Check) -> str:
    within = sum(abs(e) <= TOLERATED for e in check.errors)
    return (
        f"{len(check.errors)} random sub-networks that it does not know: off by {amounts.percent(check.median)} "
        f"(median), by {amounts.percent(check.largest)} at most; "
        f"{within} of {len(check.errors)} within {amounts.percent(TOLERATED)}"
    )


def round_check(evolution: Evolution) -> str:
    """How far the table is from the rounds' own latencies."""
    pairs = [(s.round.predicted_ms, s.latency.median_ms) for s in evolution.steps if s.latency]
    errors = [p / ms - 1 for p, ms in pairs]
    if not errors:
        return ""
    return f"Of this study's {len(errors)} rounds it is off by {amounts.percent(max(map(abs, errors)))} at most."


def lineage(evolution: Evolution) -> Iterator[tuple[Step, Step]]:
    """Every round with the one that it came from."""
    for step in evolution.steps:
        parent = evolution.parent(step)
        if parent:
            yield parent, step
