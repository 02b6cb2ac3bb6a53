"""Trials of a study as candidates, their Pareto front, and the recommended one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from archsearch.score import OBJECTIVES, Cost, LatencyRecord, MissingScore, Score, comparable, metric_label
from archsearch.stats.pareto import non_dominated
from archsearch.studies.remote.client import measured_latencies
from archsearch.studies.storage.trial_queue import seconds, slots_of
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FINAL = "final"
"""Name of the candidate of an evolving study's final round."""

State = Literal["scored", "infeasible", "failed", "running"]


@dataclass(frozen=True)
class Candidate:
    """One candidate of a study, with the trial that scores it.

    Attributes:
        number: Optuna's number of the trial.
        slot: index in the study's plan; a trial that retries another has the same slot.
        name: "base" or the name of a reference, if the candidate is one.
        point: index of the choice of each knob.
        score: the score, as far as it is known.
        infeasible: which limit it breaks, and by how much. A scored candidate can break a limit on its quality.
        artifacts: artifact ids by file name.
        seconds: duration of the trial, up to now if it is running.
        reused_from: number of the trial of the same architecture whose score was reused.
        error: the error that scoring raised.
        phase: what a running trial does at the moment.
        fraction: share of that phase that is done.
        attempts: number of trials of the slot so far.
    """

    number: int
    slot: int
    name: str | None
    point: dict[str, int]
    architecture: Architecture
    score: Score
    state: State
    infeasible: str | None
    artifacts: dict[str, str]
    seconds: float
    reused_from: int | None = None
    error: str | None = None
    phase: str = ""
    fraction: float = 0.0
    attempts: int = 1

    @property
    def feasible(self) -> bool:
        """Whether no limit is known to be broken."""
        return self.infeasible is None

    def value(self, objective: str) -> float:
        """One number of the score.

        Raises:
            archsearch.score.MissingScore: if the score lacks it.
        """
        return OBJECTIVES[objective].getter(self.score)


def load_candidates(study: Study, *, artifacts: bool = True) -> list[Candidate]:
    """Load the candidate of every slot, in the order of the slots: its active trial, else the last one that failed.

    Trials without an architecture and trials that no worker made are left out.

    Args:
        artifacts: whether to load artifact ids too, which takes one query per trial.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if "worker" in t.user_attrs]
    slots = slots_of(trials)
    by_slot: dict[int, list[FrozenTrial]] = {}
    for t in trials:
        by_slot.setdefault(slots[t.number], []).append(t)
    candidates = (_of_slot(study if artifacts else None, slot, by_slot[slot]) for slot in sorted(by_slot))
    measured = measured_latencies(study)
    return [_with_measured(candidate, measured) for candidate in candidates if candidate is not None]


def _with_measured(candidate: Candidate, measured: Mapping[str, LatencyRecord]) -> Candidate:
    """The candidate with its provisional prediction replaced by the measurement, if that has arrived."""
    record, latency = measured.get(candidate.architecture.id), candidate.score.latency
    if record is None or latency is None or latency.source == "measured":
        return candidate
    return replace(candidate, score=candidate.score.model_copy(update={"latency": record}))


def _of_slot(study: Study | None, slot: int, attempts: Sequence[FrozenTrial]) -> Candidate | None:
    """The candidate of one slot from its trials; None if no architecture was chosen yet."""
    active = [t for t in attempts if t.state.name != "FAIL"][:1]
    chosen = active or [t for t in attempts if "architecture" in t.user_attrs][-1:]
    if not chosen or "architecture" not in chosen[0].user_attrs:
        return None
    t = chosen[0]
    states: dict[str, State] = {"COMPLETE": "scored", "PRUNED": "infeasible", "FAIL": "failed"}
    attrs = t.user_attrs
    exceeded = ", ".join(f"{name} by {excess:.1%}" for name, excess in t.constraints.items() if excess > 0)
    return Candidate(
        number=t.number,
        slot=slot,
        name=attrs.get("name"),
        point=dict(t.params),
        architecture=Architecture.model_validate(attrs["architecture"]),
        score=Score.model_validate(attrs["score"]) if "score" in attrs else _EMPTY_SCORE,
        state=states.get(t.state.name, "running"),
        infeasible=attrs.get("infeasible") or exceeded or None,
        artifacts={} if study is None else _artifacts(study, t),
        seconds=seconds(t),
        reused_from=attrs.get("reused_from"),
        error=attrs.get("error"),
        phase=attrs.get("stage", ""),
        fraction=attrs.get("fraction", 0.0),
        attempts=sum("lost" not in attempt.user_attrs for attempt in attempts),
    )


_EMPTY_SCORE = Score(cost=Cost(params=0, macs=0, activation_bytes=0))
"""Score of a trial that stopped before its cost was known."""


def _artifacts(study: Study, t: FrozenTrial) -> dict[str, str]:
    from optuna.artifacts import get_all_artifact_meta

    return {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(t, storage=study._storage)}


def objectives(study: Study) -> tuple[str, ...]:
    """Names of the objectives of a study."""
    return tuple(study.user_attrs["settings"]["objectives"])


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Scored and feasible candidates, each architecture once: the final round if it has one, else the first trial."""
    seen: set[str] = set()
    unique = []
    for c in sorted(candidates, key=lambda c: (c.reused_from is not None, c.name != FINAL, c.slot)):
        if c.state == "scored" and c.feasible and c.architecture.id not in seen:
            seen.add(c.architecture.id)
            unique.append(c)
    return sorted(unique, key=lambda c: c.slot)


def pareto_front(candidates: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """Pareto front: the eligible candidates that no other one dominates, sorted by the first objective.

    Of candidates with equal values the one of the lowest slot is kept.

    Raises:
        archsearch.score.ProtocolMismatch: if their quality was measured under different protocols.
    """
    ranked = eligible(candidates)
    qualities = [c.score.quality for c in ranked if c.score.quality is not None]
    for quality in qualities[1:]:
        comparable(qualities[0], quality)
    return [ranked[i] for i in non_dominated([tuple(c.value(name) for name in names) for c in ranked])]


@dataclass(frozen=True)
class Recommendation:
    """A recommended candidate, the reason, and the front (or candidates) it was chosen from."""

    candidate: Candidate
    reason: str
    front: list[Candidate] = field(default_factory=list)


def best(study: Study, *, objective: str | None = None) -> Recommendation:
    """Recommend a candidate: the knee of the front, the final round of an evolving study, or the best in one number.

    Works for running, finished and killed studies.

    Args:
        objective: number to minimize; None: the knee, or the final round.

    Raises:
        InputError: if no candidate is scored yet, or none has the number.
    """
    names = objectives(study)
    candidates = load_candidates(study)
    ranked = eligible(candidates)
    if not ranked:
        problem = f"no candidate is scored yet ({len(candidates)} started)"
        raise InputError(study.study_name, problem, "run archsearch search, or wait for its first trial")
    if objective is not None:
        return _best_in(ranked, objective, study.study_name)
    return recommended(ranked, pareto_front(ranked, names), names)


def recommended(ranked: Sequence[Candidate], front: Sequence[Candidate], names: Sequence[str]) -> Recommendation:
    """The network of an evolving study's final round, if there is one; else the knee of ``front``."""
    final = next((c for c in ranked if c.name == FINAL), None)
    if final is not None:
        return Recommendation(final, "the network of the final round of the evolution", list(front))
    return knee(front, names)


def _best_in(ranked: Sequence[Candidate], objective: str, study_name: str) -> Recommendation:
    if objective not in OBJECTIVES:
        raise InputError("--objective", f"unknown objective {objective!r:.60}", f"use {', '.join(OBJECTIVES)}")
    try:
        chosen = min(ranked, key=lambda c: (c.value(objective), c.slot))
    except MissingScore as error:
        raise InputError(study_name, str(error), "name a number that the study measures", place=objective) from None
    reason = f"lowest {_label(objective, chosen)} of {len(ranked)} scored candidates"
    return Recommendation(chosen, reason, list(ranked))


def knee(front: Sequence[Candidate], names: Sequence[str]) -> Recommendation:
    """The knee of a front, where giving up a little of either objective gains little of the other.

    Each objective is scaled to run from 0 (its best on the front) to 1 (its worst); costs and times are scaled by their
    logarithm. With two objectives the knee is the candidate furthest below the line between the two ends, with more it
    is the candidate nearest to the origin. A front of one or two has no knee; its best in the first objective is
    recommended.
    """
    assert front, "an empty front"
    if len(names) == 1 or len(front) < 3:
        best_first = min(front, key=lambda c: c.value(names[0]))
        return Recommendation(
            best_first, f"lowest {_label(names[0], best_first)} of a front of {len(front)}", list(front)
        )
    scaled = [_scaled([c.value(name) for c in front], name) for name in names]
    coordinates = list(zip(*scaled, strict=True))  # a tuple for each candidate
    if len(names) == 2:
        # Signed distance of (a, b) below the line a + b = 1 through the two ends (0, 1) and (1, 0).
        below = [(1 - a - b) / math.sqrt(2) for a, b in coordinates]
        i = max(range(len(front)), key=lambda k: below[k])
        criterion = "furthest below the line between the front's two ends"
    else:
        i = min(range(len(front)), key=lambda k: math.dist(coordinates[k], [0.0] * len(names)))
        criterion = "nearest to the best of all objectives at once"
    chosen = front[i]
    trade = "; ".join(_compared_with_best(chosen, front, name) for name in names)
    return Recommendation(chosen, f"the knee of a front of {len(front)}, {criterion}: {trade}", list(front))


def _scaled(values: Sequence[float], name: str) -> list[float]:
    if name in ("latency_ms", "params", "macs", "activation_bytes") and min(values) > 0:
        values = [math.log(v) for v in values]
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _compared_with_best(chosen: Candidate, front: Sequence[Candidate], name: str) -> str:
    """One number of a candidate compared with the best on the front, in words."""
    value, lowest = chosen.value(name), min(c.value(name) for c in front)
    label, unit = _label(name, chosen), OBJECTIVES[name].unit
    shown = f"{value:.4g} {unit}".strip()
    if value <= lowest:
        return f"{label} {shown}, the lowest"
    ratio = f"{value / lowest:.2f} times" if lowest > 0 else f"{value - lowest:.3g} above"
    return f"{label} {shown}, {ratio} the lowest"


def _label(name: str, candidate: Candidate) -> str:
    quality = candidate.score.quality
    return metric_label(name, quality.extractor if quality else "")
