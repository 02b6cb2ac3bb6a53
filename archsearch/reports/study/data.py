"""All that a report is made from: a study's trials and attributes, checked to be fit for one page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from archsearch.reports.rendering import formatting
from archsearch.score import QUALITY_METRICS, ProtocolMismatch, Quality, comparable
from archsearch.stats.estimate import Estimate
from archsearch.stats.main_effects import EffectInterval, KnobFactor
from archsearch.studies.search import candidates as trials
from archsearch.studies.search.candidates import Candidate
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class StudyData:
    """A study as its report sees it.

    Attributes:
        candidates: every trial that counts, in the order of their slots.
        scored: those that were trained and keep all limits, each architecture once.
        front: numbers of the candidates that no other one beats in every objective.
        best: the recommended candidate; ``reason`` says why.
    """

    name: str
    attrs: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    scored: tuple[Candidate, ...]
    front: frozenset[int]
    best: Candidate
    reason: str

    @cached_property
    def distinct(self) -> tuple[Candidate, ...]:
        """Every architecture of which anything is known, once, whether within the limits or not."""
        known = {c.architecture.id: c for c in reversed(self.candidates) if c.score.cost.params}
        known |= {c.architecture.id: c for c in self.scored}
        return tuple(sorted(known.values(), key=lambda c: c.slot))

    @cached_property
    def trained(self) -> tuple[Candidate, ...]:
        """Those of `distinct` that have a quality, of a training that held."""
        return tuple(c for c in self.distinct if c.score.quality and not c.score.quality.diverged)

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the study minimises."""
        return tuple(self.attrs["settings"]["objectives"])

    @cached_property
    def extractor(self) -> str:
        """The feature extractor of the distances."""
        return next((c.score.quality.extractor for c in self.trained if c.score.quality), "")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the protocol, in the order of every estimate's ``by_seed``."""
        protocol = self.attrs.get("protocol", {})
        named = protocol.get("protocol", protocol).get("seeds", ())
        return tuple(named) or tuple(
            range(max((len(e.by_seed) for _, e in estimates(self, "validation_loss")), default=0))
        )

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """The score's numbers that were taken, objectives first."""
        order = dict.fromkeys((*self.objectives, *QUALITY_METRICS, *formatting.COSTS))
        return tuple(name for name in order if all(self.amount(c, name) for c in self.scored))

    @cached_property
    def base(self) -> Architecture:
        """The architecture that the knobs change."""
        return Architecture.model_validate(self.attrs["space"]["base"])

    @cached_property
    def factors(self) -> tuple[KnobFactor, ...]:
        """The space's knobs, each with the base's choice."""
        return tuple(_factor(knob, self.base) for knob in self.attrs["space"]["knobs"])

    def amount(self, candidate: Candidate, name: str) -> EffectInterval | None:
        """One number of a candidate, or None where it was not taken."""
        return formatting.value_of(candidate.score, name)

    def label(self, name: str, *, short: bool = False) -> str:
        """A number's name for people."""
        return formatting.label(name, self.extractor, short=short)

    def choices(self, candidate: Candidate) -> dict[str, str]:
        """Each knob's name and what its choice is called."""
        return {f.name: f.choices[candidate.point[f.name]] for f in self.factors if f.name in candidate.point}

    def departures(self, candidate: Candidate) -> dict[str, str]:
        """The choices in which a candidate differs from the base."""
        base = {f.name: f.base for f in self.factors}
        return {k: v for k, v in self.choices(candidate).items() if candidate.point[k] != base[k]}


def _factor(knob: Mapping[str, Any], base: Architecture) -> KnobFactor:
    choice = next((i for i, c in enumerate(knob["changes"]) if apply_overrides(base, c).id == base.id), 0)
    return KnobFactor(knob["name"], tuple(knob["choices"]), bool(knob["ordered"]), choice)


def title(candidate: Candidate) -> str:
    """What to call a candidate: its design's name, or its trial."""
    return candidate.name or f"trial {candidate.number}"


def diverged(candidate: Candidate) -> bool:
    """Whether training came to nothing; its numbers would stretch every axis."""
    return candidate.score.quality is not None and candidate.score.quality.diverged


def estimates(facts: StudyData, name: str) -> list[tuple[Candidate, Estimate]]:
    """Every trained candidate and its estimate of one quality metric."""
    return [(c, e) for c in facts.trained if (e := getattr(c.score.quality, name))]


def load_study_data(study: Study) -> StudyData:
    """All of a study, running or finished.

    Raises:
        InputError: if nothing was scored yet.
        Incomparable: if its candidates were scored under different protocols.
    """
    source = f"study {study.study_name}"
    attrs = study.user_attrs
    every = tuple(trials.load_candidates(study))
    if not trials.eligible(every):
        problem = f"has no scored candidate within the limits{_instead(every)}"
        raise InputError(source, problem, "run archsearch search, or wait for its first trial")
    _check_protocols(source, every)
    every = _compared(every)
    names = trials.objectives(study)
    front = trials.pareto_front(every, names)
    choice = trials.recommended(trials.eligible(every), front, names)
    numbers = frozenset(c.number for c in front)
    return StudyData(
        study.study_name, attrs, every, tuple(trials.eligible(every)), numbers, choice.candidate, choice.reason
    )


def _instead(every: Sequence[Candidate]) -> str:
    counts = {state: sum(c.state == state for c in every) for state in ("infeasible", "failed", "running")}
    found = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f" ({found})" if found else ""


def _compared(every: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates with the intervals by which those of one study are compared
    (`archsearch.stats.intervals.pool_intervals`)."""
    from archsearch.stats.intervals import pool_intervals

    qualities = {c.architecture.id: c.score.quality for c in every if c.score.quality and not diverged(c)}
    for name in QUALITY_METRICS:
        ids = [i for i, quality in qualities.items() if getattr(quality, name)]
        found = pool_intervals([getattr(qualities[i], name) for i in ids])
        qualities |= {i: qualities[i].model_copy(update={name: e}) for i, e in zip(ids, found, strict=True)}
    return tuple(_with_quality(c, qualities.get(c.architecture.id)) for c in every)


def _with_quality(candidate: Candidate, quality: Quality | None) -> Candidate:
    if quality is None or candidate.score.quality is None:
        return candidate
    return dataclasses.replace(candidate, score=candidate.score.model_copy(update={"quality": quality}))


def _check_protocols(source: str, every: Sequence[Candidate]) -> None:
    qualities = [(c, c.score.quality) for c in every if c.score.quality]
    for candidate, quality in qualities[1:]:
        try:
            comparable(qualities[0][1], quality)
        except ProtocolMismatch as error:
            place = f"trials {qualities[0][0].number} and {candidate.number}"
            raise ProtocolMismatch(source, error.problem, "report each protocol's study alone", place=place) from None
