"""An ablation: every row scored with the same seeds, and what each choice is worth by itself and among the others.

The rows are an ordinary study's candidates, so it resumes, shares workers and reports as any study does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from archsearch.score import OBJECTIVES, QUALITY_METRICS, LatencyRecord, MissingScore, Score
from archsearch.stats import intervals
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import Verdict, verdict
from archsearch.studies.config.ablation import AblationConfig, AblationRow, Group, Quantity, plan
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study


COSTS: tuple[Quantity, ...] = ("params", "macs", "latency_ms")


SumVerdict = Literal["adds up", "more than the sum", "less than the sum", "cannot tell"]


EstimatesById = Mapping[str, Estimate]
"""A quality number of every trained architecture, once each, by id."""


@dataclass(frozen=True)
class Effect:
    """What a row's change does to a quality number: the row's less that of the row it is compared with.

    Smaller is better for every number here, so a difference below 0 is a gain.
    """

    difference: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class RowResult:
    """A row, and what was found of it.

    Attributes:
        planned: the row.
        score: None while it is not scored.
        changes: of params, MACs and milliseconds against the row it is compared with, in percent.
        effects: on each quality number, where both rows were trained.
        quality: each quality number, with the interval by which the study's rows are compared.
        trial: that gave the score.
        error: why it has none.
    """

    planned: AblationRow
    score: Score | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    quality: Mapping[str, Estimate] = field(default_factory=dict)
    trial: int | None = None
    error: str | None = None

    def apart(self, name: Quantity) -> float | None:
        """Our change less the published one, in percentage points; None where either is missing."""
        published, ours = self.planned.published.get(name), self.changes.get(name)
        if published is None or published.value is None or ours is None:
            return None
        return ours - published.value


@dataclass(frozen=True)
class AdditivityCheck:
    """Single effects against the joint one, of one number.

    Attributes:
        name: of the number.
        group: whose single effects: ``alone``, each choice on the base, or ``without``, each from the final design.
        single: their sum; for params, MACs and milliseconds their product, as a change in percent.
        joint: of the final design on the base, likewise.
        excess: joint less single, with its interval; for costs, which are exact or have their quartiles apart, None.
        verdict: "more than the sum" if the choices together gain more than one by one.
    """

    name: str
    group: Group
    single: float
    joint: float
    excess: Estimate | None
    verdict: SumVerdict


@dataclass(frozen=True)
class Ablation:
    """All that an ablation study has found so far."""

    name: str
    settings: StudyConfig
    attrs: Mapping[str, Any]
    results: tuple[RowResult, ...]
    sums: tuple[AdditivityCheck, ...]

    @property
    def ablation(self) -> AblationConfig:
        """Its rows, as the YAML had them when it last ran."""
        assert self.settings.ablation is not None
        return self.settings.ablation

    @property
    def metrics(self) -> tuple[str, ...]:
        """The quality numbers that some row has."""
        return tuple(name for name in QUALITY_METRICS if any(name in r.quality for r in self.results))

    @property
    def extractor(self) -> str:
        """Whose features the distances are of; empty where nothing was trained."""
        qualities = (r.score.quality for r in self.results if r.score)
        return next((q.extractor for q in qualities if q), "")

    def result(self, name: str) -> RowResult:
        """The row of that name."""
        return next(r for r in self.results if r.planned.name == name)


def load_results(study: Study) -> Ablation:
    """What an ablation study has found, running, killed or finished.

    Raises:
        InputError: if the study is no ablation.
    """
    attrs = study.user_attrs
    settings = StudyConfig.model_validate(attrs["settings"])
    if settings.ablation is None:
        raise InputError(study.study_name, "is no ablation", "run archsearch report")
    base = Architecture.model_validate(attrs["space"]["base"])
    rows = plan(settings.ablation, base, source=study.study_name)
    candidates = {c.architecture.id: c for c in load_candidates(study, artifacts=False)}
    results = []
    for row in rows:
        candidate = candidates.get(row.architecture.id)
        if candidate is None or candidate.state != "scored":
            error = candidate.error or candidate.state if candidate else "not begun"
            results.append(RowResult(row, error=error))
        else:
            record = attrs.get("latencies", {}).get(row.architecture.id)
            results.append(RowResult(row, _timed(candidate.score, record), trial=candidate.number))
    pools = {name: _pool(results, name) for name in QUALITY_METRICS}
    results = _compared(results, pools)
    return Ablation(study.study_name, settings, attrs, tuple(results), tuple(_sums(settings.ablation, results, pools)))


def _timed(score: Score, record: Mapping[str, Any] | None) -> Score:
    """The score with the latency that was measured in turns, where it was."""
    return score.model_copy(update={"latency": LatencyRecord.model_validate(record)}) if record else score


def _compared(results: Sequence[RowResult], pools: Mapping[str, EstimatesById]) -> list[RowResult]:
    by_name = {r.planned.name: r for r in results}
    quality = {
        name: dict(zip(pool, intervals.pool_intervals(list(pool.values())), strict=True))
        for name, pool in pools.items()
    }
    compared = []
    for r in results:
        changes: dict[str, float] = {}
        effects: dict[str, Effect] = {}
        below = by_name[r.planned.over].score if r.planned.over else None
        if r.score and below:
            changes = {n: 100 * (_value(r.score, n) / _value(below, n) - 1) for n in COSTS if _has(r.score, below, n)}
            over_id = by_name[str(r.planned.over)].planned.architecture.id
            ids = (r.planned.architecture.id, over_id)
            effects = {name: _effect(pool, *ids) for name, pool in pools.items() if pool.keys() >= set(ids)}
        own = {name: q[r.planned.architecture.id] for name, q in quality.items() if r.planned.architecture.id in q}
        compared.append(RowResult(r.planned, r.score, changes, effects, own, r.trial, r.error))
    return compared


def _pool(results: Sequence[RowResult], name: str) -> EstimatesById:
    pool: dict[str, Estimate] = {}
    for r in results:
        quality = r.score.quality if r.score else None
        estimate: Estimate | None = getattr(quality, name, None)
        if estimate is not None and quality is not None and not quality.diverged and len(estimate.by_seed) > 1:
            pool[r.planned.architecture.id] = estimate
    return pool


def _effect(pool: EstimatesById, row: str, over: str) -> Effect:
    if row == over:
        zero = Estimate(value=0, low=0, high=0)
        return Effect(zero, "cannot tell")
    weights = [float((key == row) - (key == over)) for key in pool]
    difference = intervals.contrast(list(pool.values()), weights)
    return Effect(difference, verdict(difference))


def _sums(
    settings: AblationConfig, results: Sequence[RowResult], pools: Mapping[str, EstimatesById]
) -> list[AdditivityCheck]:
    by_name = {r.planned.name: r for r in results}
    base, final = by_name[settings.base], by_name[settings.final]
    sums = []
    for group in ("alone", "without"):
        singles = [r for r in results if r.planned.group == group]
        if not singles or any(r.score is None for r in (base, final, *singles)):
            continue
        sums += [_sum_of_cost(n, group, base, final, singles) for n in COSTS if _all_have([base, final, *singles], n)]
        for name, pool in pools.items():
            if pool.keys() >= {r.planned.architecture.id for r in (base, final, *singles)}:
                sums.append(_sum_of_quality(name, group, base, final, singles, pool))
    return sums


def _sum_of_cost(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult]
) -> AdditivityCheck:
    """Costs shrink by factors, so single effects multiply. Within a point of each other they add up."""
    low, high = (_value(_scored(r), name) for r in (base, final))
    logs = [math.log(_value(_scored(r), name) / (low if group == "alone" else high)) for r in singles]
    single = 100 * (math.exp(sum(logs) if group == "alone" else -sum(logs)) - 1)
    joint = 100 * (high / low - 1)
    told: SumVerdict = "more than the sum" if joint < single else "less than the sum"
    return AdditivityCheck(name, group, single, joint, None, "adds up" if abs(joint - single) <= 1 else told)


def _sum_of_quality(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult], pool: EstimatesById
) -> AdditivityCheck:
    """The contrast (final − base) − Σ single effects, each of them row − base, or final − row."""
    joint = dict.fromkeys(pool, 0.0)
    joint[final.planned.architecture.id] += 1
    joint[base.planned.architecture.id] -= 1
    single = dict.fromkeys(pool, 0.0)
    for r in singles:
        one, other = (r, base) if group == "alone" else (final, r)
        single[one.planned.architecture.id] += 1
        single[other.planned.architecture.id] -= 1
    excess = intervals.contrast(list(pool.values()), [joint[key] - single[key] for key in pool])
    added, together = (sum(weights[key] * pool[key].value for key in pool) for weights in (single, joint))
    return AdditivityCheck(name, group, added, together, excess, _sum_verdict(excess, together))


def _sum_verdict(excess: Estimate, joint: float) -> SumVerdict:
    """That effects add up can only be said where the interval of what is over is narrower than the joint effect."""
    if excess.high < 0:
        return "more than the sum"
    if excess.low > 0:
        return "less than the sum"
    return "adds up" if excess.high - excess.low <= abs(joint) else "cannot tell"


def _scored(result: RowResult) -> Score:
    assert result.score is not None
    return result.score


def _all_have(results: Sequence[RowResult], name: str) -> bool:
    return all(_has(_scored(r), _scored(r), name) for r in results)


def _has(one: Score, other: Score, name: str) -> bool:
    """Whether both have the number, and latencies were taken alike."""
    try:
        _value(one, name), _value(other, name)
    except MissingScore:
        return False
    return name != "latency_ms" or _conditions(one.latency) == _conditions(other.latency)


def _conditions(record: LatencyRecord | None) -> object:
    return record and record.conditions


def _value(score: Score, name: str) -> float:
    return OBJECTIVES[name].getter(score)
