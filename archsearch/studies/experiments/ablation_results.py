"""Results of an ablation: every row scored with the same seeds, and the effect of each choice alone and jointly.

The rows are candidates of an ordinary study, so an ablation resumes, uses workers and reports like any study.
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
from archsearch.studies.config.ablation import AblationConfig, AblationRow, Group, Quantity, expand_rows
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study


COSTS: tuple[Quantity, ...] = ("params", "macs", "latency_ms")

SumVerdict = Literal["adds up", "more than the sum", "less than the sum", "cannot tell"]

EstimatesById = Mapping[str, Estimate]
"""Estimates of one quality number, by architecture id."""


@dataclass(frozen=True)
class Effect:
    """Effect of a row on a quality number: the row's value minus that of its baseline.

    Lower is better for every number here, so a difference below 0 is an improvement.
    """

    difference: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class RowResult:
    """A row and its results.

    Attributes:
        planned: the row.
        score: the score; None until the row is scored.
        changes: changes of params, MACs and milliseconds against the row's baseline, in percent.
        effects: effect on each quality number, where both rows were trained.
        quality: each quality number, with the interval by which the study's rows are compared.
        trial: number of the trial that gave the score.
        error: why there is no score.
    """

    planned: AblationRow
    score: Score | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    quality: Mapping[str, Estimate] = field(default_factory=dict)
    trial: int | None = None
    error: str | None = None

    def apart(self, name: Quantity) -> float | None:
        """Measured change minus the published one, in percentage points; None if either is missing."""
        published, measured = self.planned.published.get(name), self.changes.get(name)
        if published is None or published.value is None or measured is None:
            return None
        return measured - published.value


@dataclass(frozen=True)
class AdditivityCheck:
    """Compares the sum of single effects with the joint effect, for one number.

    Attributes:
        name: name of the number.
        group: which single effects: ``one_at_a_time``, each choice on the base, or ``leave_one_out``, each removed from
            the final design.
        single: sum of the single effects; for params, MACs and milliseconds their product, as a change in percent.
        joint: effect of the final design against the base, in the same unit.
        excess: joint minus single, with its interval; None for costs, which are exact or whose quartiles are separate.
        verdict: "more than the sum" if the choices together gain more than the sum of the single gains.
    """

    name: str
    group: Group
    single: float
    joint: float
    excess: Estimate | None
    verdict: SumVerdict


@dataclass(frozen=True)
class Ablation:
    """All results of an ablation study so far."""

    name: str
    settings: StudyConfig
    attrs: Mapping[str, Any]
    results: tuple[RowResult, ...]
    sums: tuple[AdditivityCheck, ...]

    @property
    def ablation(self) -> AblationConfig:
        """Settings of the ablation, as of its last run."""
        assert self.settings.ablation is not None
        return self.settings.ablation

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the quality numbers that at least one row has."""
        return tuple(name for name in QUALITY_METRICS if any(name in r.quality for r in self.results))

    @property
    def extractor(self) -> str:
        """Feature extractor of the distances; empty if nothing was trained."""
        qualities = (r.score.quality for r in self.results if r.score)
        return next((q.extractor for q in qualities if q), "")

    def result(self, name: str) -> RowResult:
        """Result of the row of that name."""
        return next(r for r in self.results if r.planned.name == name)


def load_results(study: Study) -> Ablation:
    """Load the results of an ablation study; it may be running, killed or finished.

    Raises:
        InputError: if the study is not an ablation.
    """
    attrs = study.user_attrs
    settings = StudyConfig.model_validate(attrs["settings"])
    if settings.ablation is None:
        raise InputError(study.study_name, "is not an ablation", "run archsearch report")
    base = Architecture.model_validate(attrs["space"]["base"])
    rows = expand_rows(settings.ablation, base, source=study.study_name)
    candidates = {c.architecture.id: c for c in load_candidates(study)}
    results = []
    for row in rows:
        candidate = candidates.get(row.architecture.id)
        if candidate is None or candidate.state != "scored":
            error = candidate.error or candidate.state if candidate else "not started"
            results.append(RowResult(row, error=error))
        else:
            record = attrs.get("latencies", {}).get(row.architecture.id)  # measured repeatedly
            changes = {"latency": LatencyRecord.model_validate(record)} if record else {}
            results.append(RowResult(row, candidate.score.model_copy(update=changes), trial=candidate.number))
    pools = {name: _pool(results, name) for name in QUALITY_METRICS}
    results = _with_comparisons(results, pools)
    return Ablation(
        study.study_name, settings, attrs, tuple(results), tuple(_additivity_checks(settings.ablation, results, pools))
    )


def _with_comparisons(results: Sequence[RowResult], pools: Mapping[str, EstimatesById]) -> list[RowResult]:
    by_name = {r.planned.name: r for r in results}
    quality = {
        name: dict(zip(pool, intervals.pool_intervals(list(pool.values())), strict=True))
        for name, pool in pools.items()
    }
    compared = []
    for r in results:
        changes: dict[str, float] = {}
        effects: dict[str, Effect] = {}
        baseline = by_name[r.planned.baseline].score if r.planned.baseline else None
        if r.score and baseline:
            changes = {
                n: 100 * (_value(r.score, n) / _value(baseline, n) - 1) for n in COSTS if _has(r.score, baseline, n)
            }
            baseline_id = by_name[str(r.planned.baseline)].planned.architecture.id
            ids = (r.planned.architecture.id, baseline_id)
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


def _effect(pool: EstimatesById, row: str, baseline: str) -> Effect:
    """The contrast row − baseline, both given as architecture ids."""
    if row == baseline:
        return Effect(Estimate.exact(0), "cannot tell")
    difference = intervals.difference(pool, row, baseline)
    return Effect(difference, verdict(difference))


def _additivity_checks(
    settings: AblationConfig, results: Sequence[RowResult], pools: Mapping[str, EstimatesById]
) -> list[AdditivityCheck]:
    by_name = {r.planned.name: r for r in results}
    base, final = by_name[settings.base], by_name[settings.final_row]
    checks = []
    for group in ("one_at_a_time", "leave_one_out"):
        singles = [r for r in results if r.planned.group == group]
        if not singles or any(r.score is None for r in (base, final, *singles)):
            continue
        checks += [_check_cost(n, group, base, final, singles) for n in COSTS if _all_have([base, final, *singles], n)]
        for name, pool in pools.items():
            if pool.keys() >= {r.planned.architecture.id for r in (base, final, *singles)}:
                checks.append(_check_quality(name, group, base, final, singles, pool))
    return checks


def _check_cost(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult]
) -> AdditivityCheck:
    """Additivity of a cost. Costs change by factors, so single effects multiply; they add up within one point (%).

    One at a time: Π (row / base) against final / base. Leave one out: Π (final / row) against final / base.
    """
    low, high = (_value(_scored(r), name) for r in (base, final))
    logs = [math.log(_value(_scored(r), name) / (low if group == "one_at_a_time" else high)) for r in singles]
    single = 100 * (math.exp(sum(logs) if group == "one_at_a_time" else -sum(logs)) - 1)
    joint = 100 * (high / low - 1)
    direction: SumVerdict = "more than the sum" if joint < single else "less than the sum"
    return AdditivityCheck(name, group, single, joint, None, "adds up" if abs(joint - single) <= 1 else direction)


def _check_quality(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult], pool: EstimatesById
) -> AdditivityCheck:
    """Additivity of a quality number: the contrast (final − base) − Σ single effects.

    A single effect is row − base (one at a time) or final − row (leave one out).
    """
    joint = dict.fromkeys(pool, 0.0)
    joint[final.planned.architecture.id] += 1
    joint[base.planned.architecture.id] -= 1
    single = dict.fromkeys(pool, 0.0)
    for r in singles:
        with_choice, without_choice = (r, base) if group == "one_at_a_time" else (final, r)
        single[with_choice.planned.architecture.id] += 1
        single[without_choice.planned.architecture.id] -= 1
    excess = intervals.contrast(list(pool.values()), [joint[key] - single[key] for key in pool])
    single_total, joint_total = (sum(weights[key] * pool[key].value for key in pool) for weights in (single, joint))
    return AdditivityCheck(name, group, single_total, joint_total, excess, _sum_verdict(excess, joint_total))


def _sum_verdict(excess: Estimate, joint: float) -> SumVerdict:
    """Verdict on the excess of the joint effect; "adds up" requires an interval narrower than the joint effect."""
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


def _has(a: Score, b: Score, name: str) -> bool:
    """Whether both scores have the number, and latencies were measured under the same conditions."""
    try:
        _value(a, name), _value(b, name)
    except MissingScore:
        return False
    return name != "latency_ms" or _conditions(a.latency) == _conditions(b.latency)


def _conditions(record: LatencyRecord | None) -> object:
    return record and record.conditions


def _value(score: Score, name: str) -> float:
    return OBJECTIVES[name].getter(score)
