"""A study's trials as candidates, their Pareto front, and the one to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from archsearch.score import OBJECTIVES, Cost, LatencyRecord, MissingScore, Score, comparable, metric_label
from archsearch.studies.remote.client import measured
from archsearch.studies.storage.trial_queue import seconds, slots_of
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FINAL = "final"
"""The name of the last round of an evolving study."""

State = Literal["scored", "infeasible", "failed", "running"]


@dataclass(frozen=True)
class Candidate:
    """One trial.

    Attributes:
        number: Optuna's.
        slot: its place in the study's plan; a trial that was run again has its first one's.
        name: "base" or a reference's.
        point: knob to the index of its choice.
        score: as far as it is known.
        infeasible: which limit it breaks, and by how much. A scored candidate can break one too, on its quality.
        artifacts: file name to artifact id.
        seconds: it took, or has taken so far.
        reused_from: the trial of the same architecture whose score it has.
        error: what scoring it raised.
        attempts: trials of its slot so far.
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
    stage: str = ""
    fraction: float = 0.0
    attempts: int = 1

    @property
    def feasible(self) -> bool:
        """Whether it keeps all limits, as far as they are known."""
        return self.infeasible is None

    def value(self, objective: str) -> float:
        """One of its numbers.

        Raises:
            archsearch.score.MissingScore: if it was not taken.
        """
        return OBJECTIVES[objective].getter(self.score)


def load_candidates(study: Study, *, artifacts: bool = True) -> list[Candidate]:
    """Every slot's candidate, in the order of the slots: the trial that counts, else the last that failed.

    Trials that have no architecture yet are left out, and so are those that no search of ours made.

    Args:
        artifacts: whether to ask the storage for them too, which takes a query a trial.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if "worker" in t.user_attrs]
    slots = slots_of(trials)
    by_slot: dict[int, list[FrozenTrial]] = {}
    for t in trials:
        by_slot.setdefault(slots[t.number], []).append(t)
    found = (_of_slot(study if artifacts else None, slot, by_slot[slot]) for slot in sorted(by_slot))
    known = measured(study)
    return [_with_measured(candidate, known) for candidate in found if candidate is not None]


def _with_measured(candidate: Candidate, known: Mapping[str, LatencyRecord]) -> Candidate:
    """A prediction that stood while the device was busy makes way for the measurement."""
    record, latency = known.get(candidate.architecture.id), candidate.score.latency
    if record is None or latency is None or latency.source == "measured":
        return candidate
    return replace(candidate, score=candidate.score.model_copy(update={"latency": record}))


def _of_slot(study: Study | None, slot: int, tried: Sequence[FrozenTrial]) -> Candidate | None:
    counts = [t for t in tried if t.state.name != "FAIL"][:1] or [t for t in tried if "architecture" in t.user_attrs][
        -1:
    ]
    if not counts or "architecture" not in counts[0].user_attrs:
        return None
    t = counts[0]
    states: dict[str, State] = {"COMPLETE": "scored", "PRUNED": "infeasible", "FAIL": "failed"}
    attrs = t.user_attrs
    over = ", ".join(f"{name} by {excess:.1%}" for name, excess in t.constraints.items() if excess > 0)
    return Candidate(
        number=t.number,
        slot=slot,
        name=attrs.get("name"),
        point=dict(t.params),
        architecture=Architecture.model_validate(attrs["architecture"]),
        score=Score.model_validate(attrs["score"]) if "score" in attrs else _NOTHING,
        state=states.get(t.state.name, "running"),
        infeasible=attrs.get("infeasible") or over or None,
        artifacts={} if study is None else _artifacts(study, t),
        seconds=seconds(t),
        reused_from=attrs.get("reused_from"),
        error=attrs.get("error"),
        stage=attrs.get("stage", ""),
        fraction=attrs.get("fraction", 0.0),
        attempts=sum("lost" not in other.user_attrs for other in tried),
    )


_NOTHING = Score(cost=Cost(params=0, macs=0, activation_bytes=0))
"""Of a trial that stopped before its cost was known."""


def _artifacts(study: Study, t: FrozenTrial) -> dict[str, str]:
    from optuna.artifacts import get_all_artifact_meta

    return {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(t, storage=study._storage)}


def objectives(study: Study) -> tuple[str, ...]:
    """The names of what a study minimises."""
    return tuple(study.user_attrs["settings"]["objectives"])


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The scored, feasible candidates, each architecture once; where it evolved, as it was in the end."""
    seen: set[str] = set()
    kept = []
    for c in sorted(candidates, key=lambda c: (c.reused_from is not None, c.name != FINAL, c.slot)):
        if c.state == "scored" and c.feasible and c.architecture.id not in seen:
            seen.add(c.architecture.id)
            kept.append(c)
    return sorted(kept, key=lambda c: c.slot)


def pareto_front(candidates: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The eligible candidates that no other one equals or beats in every objective, by the first objective.

    Raises:
        archsearch.score.ProtocolMismatch: if their quality was taken under different protocols.
    """
    able = eligible(candidates)
    qualities = [c.score.quality for c in able if c.score.quality is not None]
    for quality in qualities[1:]:
        comparable(qualities[0], quality)
    values = {c.number: tuple(c.value(name) for name in names) for c in able}

    def beaten(c: Candidate) -> bool:
        mine = values[c.number]
        for other in able:
            theirs = values[other.number]
            if all(a <= b for a, b in zip(theirs, mine, strict=True)) and (theirs, other.slot) < (mine, c.slot):
                return True
        return False

    return sorted((c for c in able if not beaten(c)), key=lambda c: values[c.number])


@dataclass(frozen=True)
class Recommendation:
    """A recommended candidate, and why. ``pareto_front``: what it was chosen from."""

    candidate: Candidate
    reason: str
    front: list[Candidate] = field(default_factory=list)


def best(study: Study, *, objective: str | None = None) -> Recommendation:
    """The candidate to take: the front's knee, the last round of an evolving study, or the best of one number.

    Works while a study runs and after it was killed.

    Raises:
        InputError: if nothing is scored yet, or no candidate has the number.
    """
    names = objectives(study)
    candidates = load_candidates(study)
    able = eligible(candidates)
    if not able:
        problem = f"no candidate is scored yet ({len(candidates)} begun)"
        raise InputError(study.study_name, problem, "run archsearch search, or wait for its first trial")
    if objective is not None:
        return _least(able, objective, study.study_name)
    return recommended(able, pareto_front(able, names), names)


def recommended(able: Sequence[Candidate], points: Sequence[Candidate], names: Sequence[str]) -> Recommendation:
    """The network that evolving ended with, where it has; else the knee of the front ``points``."""
    final = next((c for c in able if c.name == FINAL), None)
    if final is not None:
        return Recommendation(final, "the network that evolving ended with", list(points))
    return knee(points, names)


def _least(able: Sequence[Candidate], objective: str, study_name: str) -> Recommendation:
    if objective not in OBJECTIVES:
        raise InputError("--objective", f"unknown objective {objective!r:.60}", f"use {', '.join(OBJECTIVES)}")
    try:
        found = min(able, key=lambda c: (c.value(objective), c.slot))
    except MissingScore as error:
        raise InputError(study_name, str(error), "name a number that the study takes", place=objective) from None
    return Recommendation(found, f"least {_label(objective, found)} of {len(able)} scored candidates", list(able))


def knee(points: Sequence[Candidate], names: Sequence[str]) -> Recommendation:
    """Where a front bends most: giving up a little of either objective gains little of the other.

    With two objectives: the front is scaled so that each goes from 0 (its best) to 1 (its worst), costs and times by
    their logarithm, and the knee is the candidate furthest below the line between the two ends. With more, the one
    nearest to the best of all at once. A front of fewer than three has no bend: the best of the first objective.
    """
    assert points, "a front of nothing"
    if len(names) == 1 or len(points) < 3:
        best_one = min(points, key=lambda c: c.value(names[0]))
        return Recommendation(best_one, f"least {_label(names[0], best_one)} of a front of {len(points)}", list(points))
    scaled = [_scaled([c.value(name) for c in points], name) for name in names]
    places = list(zip(*scaled, strict=True))
    if len(names) == 2:
        below = [(1 - a - b) / math.sqrt(2) for a, b in places]
        i = max(range(len(points)), key=lambda k: below[k])
        what = "furthest below the line between the front's two ends"
    else:
        i = min(range(len(points)), key=lambda k: math.dist(places[k], [0.0] * len(names)))
        what = "nearest to the best of all objectives at once"
    chosen = points[i]
    trade = "; ".join(_against(chosen, points, name) for name in names)
    return Recommendation(chosen, f"the knee of a front of {len(points)}, {what}: {trade}", list(points))


def _scaled(values: Sequence[float], name: str) -> list[float]:
    if name in ("latency_ms", "params", "macs", "activation_bytes") and min(values) > 0:
        values = [math.log(v) for v in values]
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _against(chosen: Candidate, points: Sequence[Candidate], name: str) -> str:
    """The chosen one's number beside the front's best."""
    value, least = chosen.value(name), min(c.value(name) for c in points)
    label, unit = _label(name, chosen), OBJECTIVES[name].unit
    shown = f"{value:.4g} {unit}".strip()
    if value <= least:
        return f"{label} {shown}, the least"
    more = f"{value / least:.2f} times" if least > 0 else f"{value - least:.3g} above"
    return f"{label} {shown}, {more} the least"


def _label(name: str, candidate: Candidate) -> str:
    quality = candidate.score.quality
    return metric_label(name, quality.extractor if quality else "")
