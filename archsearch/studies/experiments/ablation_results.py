"""Results of an ablation: every row scored with the same seeds, and the effect of each choice alone and jointly.

The rows are candidates of an ordinary study, so an ablation resumes, uses workers and reports like any study.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from optuna import Study

from archsearch.predictor.backend import model_behind
from archsearch.score import QUALITY_METRICS, LatencyRecord, Score
from archsearch.stats import contrasts
from archsearch.stats.contrasts import SeedTable
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import Verdict, verdict
from archsearch.studies.config.ablation import AblationConfig, AblationRow, Group, Quantity, expand_rows
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

COSTS: tuple[Quantity, ...] = ("params", "macs", "latency_ms")

SumVerdict = Literal["adds up", "more than the sum", "less than the sum", "cannot tell"]

Tables = Mapping[str, SeedTable]
"""Estimates of each quality number that is measured, by architecture id."""


@dataclass(frozen=True)
class Effect:
    """Effect of a row on a quality number: the row's value minus that of its baseline.

    Lower is better for every number here, so a difference below 0 is an improvement.

    Attributes:
        difference: the difference, with the interval that it has alone.
        verdict: the verdict on it alone.
        holds_at_once: whether the verdict holds together with those on all other rows and numbers (Bonferroni).
    """

    difference: Estimate
    verdict: Verdict
    holds_at_once: bool


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
        is_latency_fitted: whether its latency is predicted by a model that was fitted to the published change itself.
    """

    planned: AblationRow
    score: Score | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    effects: Mapping[str, Effect] = field(default_factory=dict)
    quality: Mapping[str, Estimate] = field(default_factory=dict)
    trial: int | None = None
    error: str | None = None
    is_latency_fitted: bool = False

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
    def latencies(self) -> tuple[LatencyRecord, ...]:
        """Latencies of the rows."""
        return tuple(r.score.latency for r in self.results if r.score and r.score.latency)

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
    return compared(study.study_name, settings, attrs, results)


def compared(name: str, settings: StudyConfig, attrs: Mapping[str, Any], results: Sequence[RowResult]) -> Ablation:
    """The ablation of scored rows: each is compared with its baseline, and single effects with the joint one."""
    assert settings.ablation is not None
    pools = {metric: _pool(results, metric) for metric in QUALITY_METRICS}
    seed_tables = {metric: SeedTable(pool) for metric, pool in pools.items() if pool}
    results = _with_comparisons(_with_fitted_marks(results, settings), seed_tables)
    checks = _additivity_checks(settings.ablation, results, seed_tables)
    return Ablation(name, settings, attrs, tuple(results), tuple(checks))


def _with_fitted_marks(results: Sequence[RowResult], settings: StudyConfig) -> list[RowResult]:
    """Mark the rows whose published change of latency their latency model was fitted to."""
    records = [r.score.latency for r in results if r.score and r.score.latency]
    device = settings.latency.provisional or settings.latency.device
    model = model_behind(records[0], device) if records and records[0].source == "predicted" else None
    if model is None:
        return list(results)
    by_name = {r.planned.name: r for r in results}
    return [
        replace(r, is_latency_fitted="latency_ms" in r.planned.published and model.was_fitted_to(*_pair(r, by_name)))
        if r.planned.baseline
        else r
        for r in results
    ]


def _with_comparisons(results: Sequence[RowResult], seed_tables: Tables) -> list[RowResult]:
    by_name = {r.planned.name: r for r in results}
    pairs = {_pair(r, by_name) for r in results if r.planned.baseline}
    # The number of different comparisons of a row and its baseline, over all quality numbers.
    count = sum(table.rows.keys() >= {*pair} for table in seed_tables.values() for pair in pairs)
    confidence = contrasts.at_once(count)
    with_effects = []
    for r in results:
        changes: dict[str, float] = {}
        effects: dict[str, Effect] = {}
        baseline = by_name[r.planned.baseline].score if r.planned.baseline else None
        if r.score and baseline:
            names = [name for name in COSTS if _have((r.score, baseline), name)]
            changes = {name: 100 * (r.score.value(name) / baseline.value(name) - 1) for name in names}
            ids = _pair(r, by_name)
            for name, table in seed_tables.items():
                if table.rows.keys() >= {*ids}:
                    difference = table.difference(*ids)
                    at_once = verdict(table.difference(*ids, confidence=confidence))
                    effects[name] = Effect(difference, verdict(difference), holds_at_once=at_once != "cannot tell")
        arch_id = r.planned.architecture.id
        own = {name: table.mean(arch_id) for name, table in seed_tables.items() if arch_id in table.rows}
        with_effects.append(replace(r, changes=changes, effects=effects, quality=own))
    return with_effects


def _pool(results: Sequence[RowResult], name: str) -> dict[str, Estimate]:
    """A quality number of the rows by architecture id, of those that have as many seeds as any."""
    pool: dict[str, Estimate] = {}
    for r in results:
        quality = r.score.quality if r.score else None
        estimate: Estimate | None = getattr(quality, name, None)
        if estimate is not None and quality is not None and not quality.diverged:
            pool[r.planned.architecture.id] = estimate
    seeds = max((len(e.by_seed) for e in pool.values()), default=0)
    return {key: e for key, e in pool.items() if len(e.by_seed) == seeds > 1}


def _pair(row: RowResult, by_name: Mapping[str, RowResult]) -> tuple[str, str]:
    """Architecture ids of a row and its baseline."""
    return row.planned.architecture.id, by_name[str(row.planned.baseline)].planned.architecture.id


def _additivity_checks(
    settings: AblationConfig, results: Sequence[RowResult], seed_tables: Tables
) -> list[AdditivityCheck]:
    by_name = {r.planned.name: r for r in results}
    base, final = by_name[settings.base], by_name[settings.final_row]
    checks = []
    for group in ("one_at_a_time", "leave_one_out"):
        singles = [r for r in results if r.planned.group == group]
        if not singles or any(r.score is None for r in (base, final, *singles)):
            continue
        scores = [_scored(r) for r in (base, final, *singles)]
        names = [name for name in COSTS if all(score.find(name) is not None for score in scores)]
        checks += [_check_cost(name, group, base, final, singles) for name in names]
        for name, table in seed_tables.items():
            if table.rows.keys() >= {r.planned.architecture.id for r in (base, final, *singles)}:
                checks.append(_check_quality(name, group, base, final, singles, table))
    return checks


def _check_cost(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult]
) -> AdditivityCheck:
    """Additivity of a cost. Costs change by factors, so single effects multiply; they add up within one point (%).

    One at a time: Π (row / base) against final / base. Leave one out: Π (final / row) against final / base.
    """
    low, high = (_scored(r).value(name) for r in (base, final))
    logs = [math.log(_scored(r).value(name) / (low if group == "one_at_a_time" else high)) for r in singles]
    single = 100 * (math.exp(sum(logs) if group == "one_at_a_time" else -sum(logs)) - 1)
    joint = 100 * (high / low - 1)
    direction: SumVerdict = "more than the sum" if joint < single else "less than the sum"
    return AdditivityCheck(name, group, single, joint, None, "adds up" if abs(joint - single) <= 1 else direction)


def _check_quality(
    name: str, group: Group, base: RowResult, final: RowResult, singles: Sequence[RowResult], table: SeedTable
) -> AdditivityCheck:
    """Additivity of a quality number: the contrast (final − base) − Σ single effects.

    A single effect is row − base (one at a time) or final − row (leave one out).
    """
    joint = Counter([final.planned.architecture.id])
    joint.subtract([base.planned.architecture.id])
    single: Counter[str] = Counter()
    for r in singles:
        with_choice, without_choice = (r, base) if group == "one_at_a_time" else (final, r)
        single.update([with_choice.planned.architecture.id])
        single.subtract([without_choice.planned.architecture.id])
    excess = table.contrast({key: joint[key] - single[key] for key in table.rows})
    joint_total = table.contrast(joint).value
    return AdditivityCheck(
        name, group, table.contrast(single).value, joint_total, excess, _sum_verdict(excess, joint_total)
    )


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


def _have(scores: Sequence[Score], name: str) -> bool:
    """Whether all scores have the number, and latencies were measured under the same conditions."""
    conditions = {score.latency and score.latency.conditions for score in scores}
    return all(score.find(name) is not None for score in scores) and (name != "latency_ms" or len(conditions) == 1)
