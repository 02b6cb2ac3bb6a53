"""The report of an evolving study: its rounds, its final network beside the published one, its table of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from archsearch.reports.study.data import StudyData
from archsearch.score import QUALITY_METRICS, LatencyRecord, metric_label
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.evolution import EvolutionConfig
from archsearch.studies.evolution.rounds import ATTRIBUTE, EvolutionRound
from archsearch.studies.search.candidates import Candidate
from snapgen.architecture import block_index
from snapgen.architecture.block_index import BlockRef

if TYPE_CHECKING:
    from optuna import Study


NEGATED = {"retrieval": "Text–image cosine", "clip_score": "CLIP score"}
"""Metrics of `archsearch.quality.metrics` of which more is better, taken negated."""


@dataclass(frozen=True)
class RoundResult:
    """A round and the trial that it was."""

    round: EvolutionRound
    candidate: Candidate

    @cached_property
    def blocks(self) -> tuple[BlockRef, ...]:
        """Of its network, in the order of the forward pass."""
        return block_index.blocks(self.candidate.architecture)

    @property
    def latency(self) -> LatencyRecord | None:
        """Of its network, as the study's device gave it."""
        return self.candidate.score.latency

    def quality(self, metric: str) -> Estimate | None:
        """By the round's own metric, or one of the score's."""
        if metric == self.round.metric:
            return self.round.quality
        return getattr(self.candidate.score.quality, metric, None) if metric in QUALITY_METRICS else None


@dataclass(frozen=True)
class Evolution:
    """The rounds of a study, in their order; at least one."""

    facts: StudyData
    steps: tuple[RoundResult, ...]

    @property
    def settings(self) -> EvolutionConfig:
        """How it evolves."""
        return EvolutionConfig.model_validate(self.facts.attrs["settings"]["evolve"])

    @property
    def last(self) -> RoundResult:
        """The round that it ended with, so far."""
        return self.steps[-1]

    def parent(self, step: RoundResult) -> RoundResult | None:
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
        wanted = (self.last.round.metric, *(n for n in self.facts.objectives if n in QUALITY_METRICS))
        return tuple(dict.fromkeys(n for n in wanted if all(s.quality(n) for s in self.steps)))

    def label(self, metric: str) -> str:
        """A metric's name for people; negated ones say so."""
        name, _, where = metric.partition(":")
        if name in NEGATED:
            return f"{NEGATED[name]}{f' ({where})' if where else ''}, negated"
        found = metric_label(metric, self.facts.extractor)
        return found[0].upper() + found[1:]

    def action(self, step: RoundResult) -> str:
        """What led to a round, in words."""
        parent = self.parent(step)
        names = {b.name: b.label for b in parent.blocks} if parent else {}
        acts = (("removed", step.round.removed), ("copied", step.round.copied))
        said = [f"{verb} {', '.join(names.get(name, name) for name in blocks)}" for verb, blocks in acts if blocks]
        if not said:
            said = ["trained with block dropout" if step.round.phase == "robust" else "trained on"]
        beginning = f"from round {step.round.parent}: " if parent and step.round.parent != step.round.number - 1 else ""
        return beginning + "; ".join(said)


def load_evolution(study: Study, facts: StudyData) -> Evolution | None:
    """The rounds of a study; None if it has none."""
    rounds = {
        t.number: EvolutionRound.model_validate(t.user_attrs[ATTRIBUTE])
        for t in study.get_trials(deepcopy=False)
        if ATTRIBUTE in t.user_attrs
    }
    steps = [RoundResult(rounds[c.number], c) for c in facts.candidates if c.number in rounds and c.state == "scored"]
    return Evolution(facts, tuple(sorted(steps, key=lambda s: s.round.number))) if steps else None


def lineage(evolution: Evolution) -> Iterator[tuple[RoundResult, RoundResult]]:
    """Every round with the one that it came from."""
    for step in evolution.steps:
        parent = evolution.parent(step)
        if parent:
            yield parent, step
