"""Load the rounds of a study that evolves a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from archsearch.reports.study.data import StudyData
from archsearch.score import QUALITY_METRICS, LatencyRecord, metric_label
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.rounds import EvolutionRound
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef

NEGATED = {"retrieval": "Text–image cosine", "clip_score": "CLIP score"}
"""Metrics of `archsearch.quality.metrics` that are better when larger and are therefore stored negated."""


@dataclass(frozen=True)
class RoundResult:
    """A round and the trial that scored its network."""

    round: EvolutionRound
    candidate: Candidate

    @cached_property
    def blocks(self) -> tuple[BlockRef, ...]:
        """Blocks of the round's network, in the order of the forward pass."""
        return block_index.blocks(self.candidate.architecture)

    @property
    def latency(self) -> LatencyRecord | None:
        """Latency of the round's network on the study's device."""
        return self.candidate.score.latency

    def quality(self, metric: str) -> Estimate | None:
        """Quality of the round's network by the round's own metric or by one of the score; None if not measured."""
        if metric == self.round.metric:
            return self.round.quality
        return getattr(self.candidate.score.quality, metric, None) if metric in QUALITY_METRICS else None


@dataclass(frozen=True)
class Evolution:
    """The rounds of a study, ordered by their number; at least one."""

    study: StudyData
    rounds: tuple[RoundResult, ...]

    @property
    def settings(self) -> EvolutionConfig:
        """Settings of the evolution."""
        return EvolutionConfig.model_validate(self.study.attrs["settings"]["evolve"])

    @property
    def last(self) -> RoundResult:
        """The latest round."""
        return self.rounds[-1]

    def parent(self, result: RoundResult) -> RoundResult | None:
        """The round whose network was changed into this round's network; None for the first round."""
        return next((r for r in self.rounds if r.round.number == result.round.parent), None)

    @cached_property
    def cumulative_macs(self) -> dict[int, float]:
        """Training MACs of all rounds up to and including each, by round number; includes abandoned rounds."""
        total, macs_by_round = 0.0, {}
        for result in self.rounds:
            # `training_macs` counts the training of the round's ancestors too.
            parent = self.parent(result)
            total += result.round.training_macs - (parent.round.training_macs if parent else 0)
            macs_by_round[result.round.number] = total
        return macs_by_round

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that every round has: the rounds' own first, then those among the objectives of the study."""
        names = (self.last.round.metric, *(n for n in self.study.objectives if n in QUALITY_METRICS))
        return tuple(dict.fromkeys(n for n in names if all(r.quality(n) for r in self.rounds)))

    def label(self, metric: str) -> str:
        """Display name of a metric; says so if the metric is negated."""
        name, _, location = metric.partition(":")
        if name in NEGATED:
            return f"{NEGATED[name]}{f' ({location})' if location else ''}, negated"
        label = metric_label(metric, self.study.extractor)
        return label[0].upper() + label[1:]

    def action(self, result: RoundResult) -> str:
        """The change or training that led to a round's network, as text."""
        parent = self.parent(result)
        labels = {b.name: b.label for b in parent.blocks} if parent else {}
        edits = (("removed", result.round.removed), ("copied", result.round.copied))
        phrases = [f"{verb} {', '.join(labels.get(name, name) for name in names)}" for verb, names in edits if names]
        if not phrases:
            phrases = ["trained with block dropout" if result.round.phase == "robust" else "trained further"]
        branches = parent and result.round.parent != result.round.number - 1
        return (f"from round {result.round.parent}: " if branches else "") + "; ".join(phrases)


def load_evolution(data: StudyData) -> Evolution | None:
    """The rounds of a study; None if it has none."""
    results = [RoundResult(c.round, c) for c in data.candidates if c.round is not None and c.state == "scored"]
    return Evolution(data, tuple(sorted(results, key=lambda r: r.round.number))) if results else None


def lineage(evolution: Evolution) -> Iterator[tuple[RoundResult, RoundResult]]:
    """Pairs of a parent and its child, for every round that has a parent."""
    for result in evolution.rounds:
        parent = evolution.parent(result)
        if parent:
            yield parent, result
