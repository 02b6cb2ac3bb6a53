"""Load and check the trials and attributes of a study that its report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from archsearch.latency.timed_pass import TimedPass
from archsearch.reports.rendering import formatting
from archsearch.score import QUALITY_METRICS, LatencyRecord, ProtocolMismatch, comparable, interval_name
from archsearch.spaces.summary import KnobSummary
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search import candidates as trials
from archsearch.studies.storage.ranking import Ranking
from archsearch.studies.storage.record import Candidate
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study

    from archsearch.studies.experiments.counted_effects import CountedNeighbors


@dataclass(frozen=True)
class StudyData:
    """Contents of a study for its report.

    Attributes:
        name: name of the study.
        attrs: user attributes of the study.
        candidates: the active trial of every slot, in the order of the slots.
        scored: candidates that were trained and meet all constraints, each architecture once.
        front: trial numbers of the candidates on the Pareto front, sorted by the first objective.
        best: the recommended candidate.
        reason: why ``best`` is recommended.
    """

    name: str
    attrs: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    scored: tuple[Candidate, ...]
    front: tuple[int, ...]
    best: Candidate
    reason: str

    @cached_property
    def distinct(self) -> tuple[Candidate, ...]:
        """One candidate for each architecture that has a cost, feasible or not."""
        by_id = {c.architecture.id: c for c in reversed(self.candidates) if c.score.cost.params}
        by_id |= {c.architecture.id: c for c in self.scored}
        return tuple(sorted(by_id.values(), key=lambda c: c.slot))

    @cached_property
    def trained(self) -> tuple[Candidate, ...]:
        """Candidates in `distinct` that have a quality and whose training did not diverge."""
        return tuple(c for c in self.distinct if c.score.quality and not c.score.quality.diverged)

    @cached_property
    def latencies(self) -> tuple[LatencyRecord, ...]:
        """Latencies of the candidates in `distinct`."""
        return tuple(c.score.latency for c in self.distinct if c.score.latency)

    @cached_property
    def timed_pass(self) -> TimedPass:
        """The forward pass that the latencies are of."""
        return TimedPass.of_study(self.attrs)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives, which are minimized."""
        return tuple(self.attrs["settings"]["objectives"])

    @cached_property
    def extractor(self) -> str:
        """Name of the feature extractor of the Fréchet and kernel distances; empty if nothing was trained."""
        return next((c.score.quality.extractor for c in self.trained if c.score.quality), "")

    @property
    def proxy(self) -> str | None:
        """Name of the space whose candidates were trained in place of the study's own, if it has a proxy."""
        proxy: str | None = self.attrs["space"].get("proxy", {}).get("name")
        return proxy

    @property
    def short_steps(self) -> int:
        """Training steps of the candidates."""
        return StudyConfig.model_validate(self.attrs["settings"]).protocol.steps

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of the protocol, in the order of every estimate's ``by_seed``."""
        protocol = self.attrs.get("protocol", {})
        seeds = protocol.get("protocol", protocol).get("train_seeds", ())
        return tuple(seeds) or tuple(
            range(max((len(e.by_seed) for _, e in estimates(self, "validation_loss")), default=0))
        )

    @cached_property
    def chances(self) -> dict[int, float]:
        """Probability that a candidate is on the front, by trial number, in a study with rungs."""
        if not self.attrs["settings"].get("rungs"):
            return {}
        return Ranking(StudyConfig.model_validate(self.attrs["settings"]), self.candidates).chances

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """Names of the numbers that every scored candidate has, objectives first."""
        order = dict.fromkeys((*self.objectives, *QUALITY_METRICS, *formatting.COSTS))
        return tuple(name for name in order if all(self.value_of(c, name) for c in self.scored))

    @property
    def quality_measures(self) -> tuple[str, ...]:
        """Those of `measures` that are quality numbers."""
        return tuple(name for name in self.measures if name in QUALITY_METRICS)

    @cached_property
    def base(self) -> Architecture:
        """Base architecture of the search space."""
        return Architecture.model_validate(self.attrs["space"]["base"])

    @cached_property
    def factors(self) -> tuple[KnobSummary, ...]:
        """Knobs of the search space, each with the choice of the base architecture."""
        return tuple(_factor(knob, self.base) for knob in self.attrs["space"]["knobs"])

    @cached_property
    def counted_neighbors(self) -> CountedNeighbors | None:
        """Costs, and latency if it is predicted, of neighbors of the base and of candidates on the front."""
        from archsearch.studies.experiments.counted_effects import count_neighbors

        chosen = [c for c in self.distinct if c.name == "base" or c.number in self.front]
        points = [c.point for c in chosen if len(c.point) == len(self.factors)]
        if not points or not self.factors:
            return None
        equal = len({record.conditions for record in self.latencies}) == 1
        predicted = self.latencies[0] if equal and self.latencies[0].source == "predicted" else None
        return count_neighbors(self.attrs, self.factors, points, predicted=predicted)

    def value_of(self, candidate: Candidate, name: str) -> Estimate | None:
        """One number of a candidate, or None if it was not measured; see `formatting.value_of`."""
        return formatting.value_of(candidate.score, name)

    def label(self, name: str, *, short: bool = False, with_interval: bool = False) -> str:
        """Display name of a number, and what its interval is if asked for."""
        text = formatting.label(name, self.extractor, self.proxy, self.latencies, short=short)
        return formatting.with_interval(text, interval_name(name, self.latencies)) if with_interval else text

    def axis(self, name: str) -> str:
        """Axis title of a number: its display name and its unit."""
        return formatting.axis(name, self.extractor, self.proxy, self.latencies)

    def column(self, name: str) -> str:
        """Head of a number's column: its axis title, and what its interval is."""
        return formatting.with_interval(self.axis(name), interval_name(name, self.latencies))

    def choices(self, candidate: Candidate) -> dict[str, str]:
        """Name of the choice that a candidate makes for each knob."""
        return {f.name: f.choices[candidate.point[f.name]] for f in self.factors if f.name in candidate.point}

    def differences_from_base(self, candidate: Candidate) -> dict[str, str]:
        """Choices of a candidate that differ from those of the base architecture, by knob."""
        base = {f.name: f.base for f in self.factors}
        return {k: v for k, v in self.choices(candidate).items() if candidate.point[k] != base[k]}


def _factor(knob: Mapping[str, Any], base: Architecture) -> KnobSummary:
    choice = next((i for i, c in enumerate(knob["changes"]) if apply_overrides(base, c).id == base.id), 0)
    return KnobSummary(knob["name"], tuple(knob["choices"]), bool(knob["ordered"]), choice)


def title(candidate: Candidate) -> str:
    """Display name of a candidate: the name of its design, or its trial number."""
    return candidate.name or f"trial {candidate.number}"


def diverged(candidate: Candidate) -> bool:
    """Whether the training diverged; charts omit such candidates because they would stretch the axes."""
    return candidate.score.quality is not None and candidate.score.quality.diverged


def estimates(study: StudyData, name: str) -> list[tuple[Candidate, Estimate]]:
    """Estimates of one quality metric, for every trained candidate that has it."""
    return [(c, e) for c in study.trained if (e := getattr(c.score.quality, name))]


def load_study_data(study: Study) -> StudyData:
    """Load the report's data from a study, running or finished.

    Raises:
        InputError: if no candidate has been scored yet, or all are infeasible.
        ProtocolMismatch: if the candidates were scored under different protocols.
    """
    source = f"study {study.study_name}"
    attrs = study.user_attrs
    candidates = tuple(trials.load_candidates(study))
    if not trials.eligible(candidates):
        trials.check_any_feasible(study, candidates)
        problem = f"has no scored candidate that meets the constraints{_state_counts(candidates)}"
        raise InputError(source, problem, "run archsearch search, or wait for the first trial to finish")
    _check_protocols(source, candidates)
    candidates = tuple(trials.with_pooled_intervals(candidates))
    names = trials.objectives(study)
    front = trials.pareto_front(candidates, names)
    choice = trials.recommended(trials.eligible(candidates), front, names)
    return StudyData(
        name=study.study_name,
        attrs=attrs,
        candidates=candidates,
        scored=tuple(trials.eligible(candidates)),
        front=tuple(c.number for c in front),
        best=choice.candidate,
        reason=choice.reason,
    )


def _state_counts(candidates: Sequence[Candidate]) -> str:
    """Counts of the states that explain why nothing is scored, in parentheses; empty without any."""
    counts = {
        state: sum(c.state == state for c in candidates) for state in ("infeasible", "failed", "running", "paused")
    }
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f" ({text})" if text else ""


def _check_protocols(source: str, candidates: Sequence[Candidate]) -> None:
    qualities = [(c, c.score.quality) for c in candidates if c.score.quality]
    for candidate, quality in qualities[1:]:
        try:
            comparable(qualities[0][1], quality)
        except ProtocolMismatch as error:
            place = f"trials {qualities[0][0].number} and {candidate.number}"
            raise ProtocolMismatch(
                source, error.problem, "write a separate report for each protocol", place=place
            ) from None
