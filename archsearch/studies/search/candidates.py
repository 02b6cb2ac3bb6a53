"""Trials of a study as candidates, their Pareto front, and the recommended one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna import Study

from archsearch.score import OBJECTIVES, QUALITY_METRICS, MissingScore, check_one_runtime, comparable
from archsearch.stats.intervals import pool_intervals
from archsearch.stats.pareto import non_dominated
from archsearch.studies.remote.client import measured_latencies
from archsearch.studies.storage.ranking import eligible as eligible
from archsearch.studies.storage.record import Candidate, TrialRecord, damaged, fold
from archsearch.studies.storage.rounds import FINAL
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.errors import InputError


def load_candidates(study: Study) -> list[Candidate]:
    """Load the candidates, by slot, each with the score of all its seeds; see `load_attempts`."""
    return fold(load_attempts(study))


def load_attempts(study: Study) -> list[Candidate]:
    """Load what every slot scores, in the order of the slots: its active trial, else the last one that failed.

    A slot scores a candidate, or a further seed of one. Trials without an architecture and trials that no worker made
    are left out.
    """
    slots = (_of_slot(attempts) for attempts in StudyTrials(study).read().by_slot.values())
    candidates, attrs = [candidate for candidate in slots if candidate is not None], study.user_attrs
    if candidates and "settings" in attrs:
        choices = {knob["name"]: len(knob["choices"]) for knob in attrs["space"]["knobs"]}
        for candidate in candidates:
            source = f"trial {candidate.number} of study {study.study_name}"
            _check(candidate, choices, attrs["settings"]["objectives"], source)
    measured = measured_latencies(study)
    for i, candidate in enumerate(candidates):  # a provisional prediction gives way to the measurement
        record, latency = measured.get(candidate.architecture.id), candidate.score.latency
        if record is not None and latency is not None and latency.source != "measured":
            candidates[i] = candidate.with_score(latency=record)
    return candidates


def _check(candidate: Candidate, choices: Mapping[str, int], names: Sequence[str], source: str) -> None:
    """Raise unless a candidate is at a point of its study's space, or at none, and has the numbers to be ranked by.

    Args:
        choices: number of choices of each knob.
        names: the objectives.
    """
    point = candidate.point
    # Storages read the parameters before the attributes, so a running trial may seem to have only some of its point.
    is_whole = len(point) == len(choices) or candidate.state == "running"
    if point and not (is_whole and all(0 <= index < choices.get(name, 0) for name, index in point.items())):
        raise damaged(source, "is not at a point of the study's space", "point")
    for name in names if candidate.state == "scored" else ():
        try:
            candidate.value(name)
        except MissingScore as error:
            raise damaged(source, str(error), "score") from None


def _of_slot(attempts: Sequence[TrialRecord]) -> Candidate | None:
    """The candidate of one slot from its trials; None if no architecture was chosen yet."""
    active = [t for t in attempts if t.state != "failed"]
    chosen = active[0] if active else next((t for t in reversed(attempts) if isinstance(t, Candidate)), None)
    if not isinstance(chosen, Candidate):
        return None
    return chosen.model_copy(update={"attempts": sum(not (t.lost or t.reopens) for t in attempts)})


def objectives(study: Study) -> tuple[str, ...]:
    """Names of the objectives of a study."""
    return tuple(study.user_attrs["settings"]["objectives"])


def pareto_front(candidates: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """Pareto front: the eligible candidates that no other one dominates, sorted by the first objective.

    Of candidates with equal values the one of the lowest slot is kept.

    Raises:
        archsearch.score.ProtocolMismatch: if their quality was measured under different protocols.
        archsearch.score.RuntimeMismatch: if their latencies are of several runtimes.
    """
    ranked = eligible(candidates)
    if "latency_ms" in names:
        check_one_runtime((c.score.latency.runtime for c in ranked if c.score.latency), "the study")
    qualities = [c.score.quality for c in ranked if c.score.quality is not None]
    for quality in qualities[1:]:
        comparable(qualities[0], quality)
    return [ranked[i] for i in non_dominated([tuple(c.value(name) for name in names) for c in ranked])]


def with_pooled_intervals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with intervals from the spread of seeds pooled over the study (`stats.intervals.pool_intervals`).

    Reports and recommendations show these, so that a number has one interval wherever it is shown.
    """
    scored = {c.architecture.id: c.score.quality for c in candidates if c.score.quality}
    qualities = {i: quality for i, quality in scored.items() if not quality.diverged}
    for name in QUALITY_METRICS:
        ids = [i for i, quality in qualities.items() if getattr(quality, name)]
        pooled = pool_intervals([getattr(qualities[i], name) for i in ids])
        qualities |= {i: qualities[i].model_copy(update={name: e}) for i, e in zip(ids, pooled, strict=True)}
    return [
        c.with_score(quality=quality) if c.score.quality and (quality := qualities.get(c.architecture.id)) else c
        for c in candidates
    ]


@dataclass(frozen=True)
class Recommendation:
    """A recommended candidate, and the reason."""

    candidate: Candidate
    reason: str


def best(study: Study, *, objective: str | None = None) -> Recommendation:
    """Recommend a candidate: the knee of the front, the final round of an evolving study, or the best in one number.

    Works for running, finished and killed studies. Intervals are those of `with_pooled_intervals`.

    Args:
        objective: number to minimize; None: the knee, or the final round.

    Raises:
        InputError: if no candidate is scored yet or all are infeasible, or none has the number.
    """
    names = objectives(study)
    candidates = with_pooled_intervals(load_candidates(study))
    ranked = eligible(candidates)
    if not ranked:
        check_any_feasible(study, candidates)
        problem = f"no candidate is scored yet ({len(candidates)} started)"
        raise InputError(study.study_name, problem, "run archsearch search, or wait for its first trial")
    if objective is None:
        return recommended(ranked, pareto_front(ranked, names), names)
    if objective not in OBJECTIVES:
        raise InputError("--objective", f"unknown objective {objective!r:.60}", f"use {', '.join(OBJECTIVES)}")
    try:
        chosen = min(ranked, key=lambda c: (c.value(objective), c.slot))
    except MissingScore as error:
        remedy = "name a number that the study measures"
        raise InputError(study.study_name, str(error), remedy, place=objective) from None
    return Recommendation(chosen, f"lowest {chosen.label(objective)} of {len(ranked)} scored candidates")


def candidate_of(study: Study, which: int | str) -> Candidate:
    """One candidate of a study.

    Args:
        which: a trial's number, ``"best"``, or a name: ``"base"``, ``"final"`` or that of a reference of the space.

    Raises:
        InputError: if there is none.
    """
    if which == "best":
        return best(study).candidate
    every = load_candidates(study)
    found = next((c for c in every if which in (c.number, c.name)), None)
    if found is None:
        names = ", ".join(c.name for c in every if c.name) or "(no names)"
        numbers = ", ".join(str(c.number) for c in every[:5]) or "none yet"
        remedy = f"use best, a trial's number ({numbers}, …) or one of: {names}"
        raise InputError(f"study {study.study_name}", f"has no candidate {which!r:.60}", remedy)
    return found


def check_any_feasible(
    study: Study, candidates: Sequence[Candidate], *, files: tuple[str, str] | None = None, reason: str = ""
) -> None:
    """Raise if every candidate that was tried is infeasible; the error names the limit that most of them exceed.

    Args:
        files: those with the limits of the study and of its space; None: the error names the study.
        reason: why no more are tried.

    Raises:
        InputError: with the limit, where it is set, and the lowest value.
    """
    infeasible = [c for c in candidates if c.infeasible]
    exceeded = Counter(name for c in infeasible for name, excess in c.constraints.items() if excess > 0)
    if not exceeded or eligible(candidates):
        return
    (name, count), last = exceeded.most_common(1)[0], infeasible[-1]
    own, of_space = (study.user_attrs[key]["constraints"] for key in ("settings", "space"))
    limit = min(bounds[name] for bounds in (own, of_space) if name in bounds)
    lowest = limit * (1 + min(excess for c in infeasible if (excess := c.constraints.get(name, 0)) > 0))
    is_own = own.get(name) == limit
    source = f"study {study.study_name}" if files is None else files[0 if is_own else 1]
    problem = (
        f"no candidate is feasible{f' ({reason})' if reason else ''}: {count} of {len(infeasible)} exceed the limit "
        f"{limit:.4g}, e.g. trial {last.number}: {last.infeasible}"
    )
    place = f"constraints.{name}" if is_own or files else f"space.constraints.{name}"
    remedy = f"raise it; the lowest {name} was {lowest:.4g}"
    raise InputError(source, problem.replace("; ", ", "), remedy, place=place)


def recommended(ranked: Sequence[Candidate], front: Sequence[Candidate], names: Sequence[str]) -> Recommendation:
    """The network of an evolving study's final round, if there is one; else the knee of ``front``."""
    final = next((c for c in ranked if c.name == FINAL), None)
    if final is not None:
        return Recommendation(final, "the network of the final round of the evolution")
    return knee(front, names)


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
        return Recommendation(best_first, f"lowest {best_first.label(names[0])} of a front of {len(front)}")
    scaled = [_scaled([c.value(name) for c in front], name) for name in names]
    coordinates = list(zip(*scaled, strict=True))  # a tuple for each candidate
    if len(names) == 2:
        # Signed distance of (a, b) below the line a + b = 1 through the two ends (0, 1) and (1, 0).
        below = [(1 - a - b) / math.sqrt(2) for a, b in coordinates]
        i = max(range(len(front)), key=below.__getitem__)
        criterion = "furthest below the line between the front's two ends"
    else:
        i = min(range(len(front)), key=lambda k: math.dist(coordinates[k], [0.0] * len(names)))
        criterion = "nearest to the best of all objectives at once"
    chosen = front[i]
    trade = "; ".join(_compared_with_best(chosen, front, name) for name in names)
    return Recommendation(chosen, f"the knee of a front of {len(front)}, {criterion}: {trade}")


def _scaled(values: Sequence[float], name: str) -> list[float]:
    if name not in QUALITY_METRICS and min(values) > 0:
        values = [math.log(v) for v in values]
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def _compared_with_best(chosen: Candidate, front: Sequence[Candidate], name: str) -> str:
    """One number of a candidate compared with the best on the front, in words."""
    value, lowest = chosen.value(name), min(c.value(name) for c in front)
    label, unit = chosen.label(name), OBJECTIVES[name].unit
    shown = f"{value:.4g} {unit}".strip()
    if value <= lowest:
        return f"{label} {shown}, the lowest"
    ratio = f"{value / lowest:.2f} times" if lowest > 0 else f"{value - lowest:.3g} above"
    return f"{label} {shown}, {ratio} the lowest"
