"""Queue of a study's trials: claims, retries and the budget, all read from and written to Optuna's trials.

A *slot* is an index of the study's plan: 0, 1, 2, … Each slot has one active trial: the running or finished one.
Earlier failures of that slot are kept but ignored. If a worker dies, its trial is failed and the slot is open again.
The storage numbers trials atomically, and slots follow from those numbers: a trial made for a new slot gets the number
of such trials before it. A trial made for an open slot records on creation which trial it replaces (``retry_of``); if
two processes do so at once, the lower number wins.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archsearch.score import OBJECTIVES, Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.leases import end_trial, is_dead, send_heartbeat, worker_identity

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

MAX_FAILURES = 2
"""A candidate is abandoned once its scoring has raised, or ended its worker process, this many times.

A search that is killed as a whole does not count against the candidate it was scoring.
"""

MAX_INFEASIBLE_IN_A_ROW = 50
"""The study ends after this many consecutive candidates outside the limits."""

DONE = "done"
"""Phase of a trial whose score is complete; only its state may still have to be set."""


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that this worker has claimed, for one slot.

    Attributes:
        point: the candidate's point if the slot was tried before and got as far as choosing one.
    """

    trial_id: int
    number: int
    slot: int
    point: Mapping[str, int] | None


@dataclass(frozen=True)
class NothingToDo:
    """There is no slot to claim at the moment; one opens if another worker's trial fails."""


@dataclass(frozen=True)
class BudgetSpent:
    """The study is over.

    Attributes:
        reason: why, for the log.
    """

    reason: str


class TrialQueue:
    """Queue of one study's trials, as used by one of its workers."""

    def __init__(self, study: Study, settings: StudyConfig) -> None:
        self.study, self._settings = study, settings
        self._storage: BaseStorage = study._storage
        self._id = self._storage.get_study_id_from_name(study.study_name)

    # Reading

    def trials(self) -> list[FrozenTrial]:
        """All trials made by a worker, by number. Others (e.g. added by hand) are ignored."""
        trials = self._storage.get_all_trials(self._id, deepcopy=False)
        return [t for t in trials if "worker" in t.user_attrs]

    def current(self, trials: Sequence[FrozenTrial] | None = None) -> dict[int, FrozenTrial]:
        """The active trial of every slot that has one, in the order of the slots."""
        trials = self.trials() if trials is None else trials
        slots = slots_of(trials)
        active: dict[int, FrozenTrial] = {}
        for t in trials:
            if t.state.name != "FAIL":
                active.setdefault(slots[t.number], t)
        return dict(sorted(active.items()))

    # Claiming

    def claim(self) -> ClaimedTrial | NothingToDo | BudgetSpent:
        """Claim the next slot: the lowest open one, else a new one, while the budget lasts."""
        self.reap_dead()
        trials = self.trials()
        if reason_to_stop := self._over(trials):
            return reason_to_stop
        opened = open_slots(trials)
        slot = min(opened, default=None)
        earlier = opened.get(slot, []) if slot is not None else []
        attrs: dict[str, Any] = {"worker": worker_identity(), "stage": "waiting", "fraction": 0.0}
        if earlier:
            attrs["retry_of"] = earlier[0].number
        trial_id, number = self._create(attrs)
        trials = self.trials()
        if earlier and self.current(trials)[slots_of(trials)[number]].number != number:
            end_trial(self._storage, trial_id, "FAIL", lost=True)
            return self.claim()
        if self._over([t for t in trials if t.number < number]):
            # Another worker claimed the last trial of the budget between our check and our claim.
            self.release(trial_id)
            return NothingToDo()
        slot = slots_of(trials)[number]
        self.set_attrs(trial_id, slot=slot)
        points = [t.params for t in earlier if "architecture" in t.user_attrs]
        return ClaimedTrial(trial_id, number, slot, points[-1] if points else None)

    def _create(self, attrs: Mapping[str, Any]) -> tuple[int, int]:
        from optuna.trial import TrialState, create_trial

        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attrs))
        trial_id = self._storage.create_new_trial(self._id, template_trial=template)
        send_heartbeat(self._storage, trial_id)
        return trial_id, self._storage.get_trial(trial_id).number

    def _over(self, trials: Sequence[FrozenTrial]) -> NothingToDo | BudgetSpent | None:
        settings, active = self._settings, self.current(trials)
        scored = [t for t in active.values() if is_scored(t)]
        running = [t for t in active.values() if t.state.name == "RUNNING"]
        full = settings.trials is not None and len(scored) + len(running) >= settings.trials
        reason = f"{len(scored)} candidates scored"
        if not full and settings.time_budget_minutes is not None:
            seconds_left = 60 * settings.time_budget_minutes - busy_seconds(trials)
            full = seconds_left <= (statistics.median(map(seconds, scored)) if scored else 0)
            reason = f"{settings.time_budget_minutes:g} minutes spent, {reason}"
        if full:
            return NothingToDo() if running else BudgetSpent(reason)
        ended = [t for t in active.values() if t.state.name != "RUNNING"]
        tail = itertools.takewhile(lambda t: t.state.name == "PRUNED", reversed(ended))
        if len(list(tail)) >= MAX_INFEASIBLE_IN_A_ROW:
            return BudgetSpent(f"the last {MAX_INFEASIBLE_IN_A_ROW} candidates were all outside the limits; widen them")
        return None

    # Dead workers

    def reap_dead(self) -> None:
        """Fail the running trials of dead workers, or finish those whose score was complete already."""
        import optuna

        with contextlib.suppress(NotImplementedError):
            optuna.storages.fail_stale_trials(self.study)
        for t in self.trials():
            if t.state.name == "RUNNING" and is_dead(t.user_attrs["worker"]):
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._settle(t)

    def _settle(self, t: FrozenTrial) -> None:
        if t.user_attrs.get("stage") == DONE:
            self.finish(t._trial_id, values_of(Score.model_validate(t.user_attrs["score"]), self._settings.objectives))
        elif t.user_attrs.get("infeasible"):
            self.mark_infeasible(t._trial_id)
        else:
            end_trial(self._storage, t._trial_id, "FAIL")

    # Writing

    def set_attrs(self, trial_id: int, **attrs: Any) -> None:
        """Set user attributes of a trial.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: if another worker took this one for dead and ended the trial.
        """
        for key, value in attrs.items():
            self._storage.set_trial_user_attr(trial_id, key, value)

    def set_constraint(self, trial_id: int, name: str, excess: float) -> None:
        """Record the value of a constraint, unless it has one: feasible at 0 and below."""
        import optuna

        trial = optuna.trial.Trial(self.study, trial_id)
        if name not in trial.constraints:
            trial.set_constraint(name, excess)

    def set_point(self, trial_id: int, point: Mapping[str, int], choices: Mapping[str, Any]) -> None:
        """Set the parameters of a trial to a point."""
        for name, value in point.items():
            internal = choices[name].to_internal_repr(value)
            self._storage.set_trial_param(trial_id, name, internal, choices[name])

    def set_system_attrs(self, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Store attributes that the sampler needs when it is asked again."""
        for key, value in attrs.items():
            self._storage.set_trial_system_attr(trial_id, key, value)

    def finish(self, trial_id: int, values: Sequence[float]) -> None:
        """Complete a trial with the values of the objectives."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def mark_infeasible(self, trial_id: int) -> None:
        """End a trial whose candidate is outside the limits: PRUNED, without values; its constraints say why."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def release(self, trial_id: int) -> None:
        """Reopen the slot of a trial; this does not count as a failure of its candidate."""
        end_trial(self._storage, trial_id, "FAIL", withdrawn=True)

    def fail(self, trial_id: int, error: str) -> None:
        """End a trial because scoring raised; the slot is retried until `MAX_FAILURES`."""
        end_trial(self._storage, trial_id, "FAIL", error=error)

    def reject(self, trial_id: int, error: str) -> None:
        """End a trial whose candidate cannot be scored at all; the slot is not retried."""
        end_trial(self._storage, trial_id, "FAIL", error=error, refused=True)


def slots_of(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Slots by trial number, derived from what is fixed when a trial is created, so that all workers agree."""
    slots: dict[int, int] = {}
    new = itertools.count()
    for t in sorted(trials, key=lambda t: t.number):
        retried = t.user_attrs.get("retry_of")
        slots[t.number] = next(new) if retried is None else slots[retried]
    return slots


def open_slots(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Slots whose trials have all failed and that are not abandoned, each with those trials by number."""
    slots = slots_of(trials)
    by_slot: dict[int, list[FrozenTrial]] = {}
    for t in trials:
        by_slot.setdefault(slots[t.number], []).append(t)
    return {
        slot: attempts
        for slot, attempts in by_slot.items()
        if all(t.state.name == "FAIL" for t in attempts) and not is_abandoned(attempts)
    }


def is_abandoned(attempts: Sequence[FrozenTrial]) -> bool:
    """Whether a slot's trials failed too often to be retried, or one was rejected for good."""
    failures = sum("error" in t.user_attrs for t in attempts)
    return failures >= MAX_FAILURES or any("refused" in t.user_attrs for t in attempts)


def values_of(score: Score, objectives: Sequence[str]) -> list[float]:
    """Values of the objectives, in the study's order."""
    return [OBJECTIVES[name].getter(score) for name in objectives]


def is_scored(t: FrozenTrial) -> bool:
    """Whether a trial counts against the budget: it was scored, and did not reuse an earlier score."""
    return t.state.name == "COMPLETE" and t.user_attrs.get("reused_from") is None


def seconds(t: FrozenTrial) -> float:
    """Duration of a trial, up to now if it is running."""
    until = t.datetime_complete or datetime.datetime.now()
    return (until - t.datetime_start).total_seconds() if t.datetime_start else 0.0


def busy_seconds(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which at least one worker was busy, over all runs of the study; failed trials are not counted."""
    now = datetime.datetime.now()
    busy = sorted(
        (t.datetime_start, t.datetime_complete or now) for t in trials if t.state.name != "FAIL" and t.datetime_start
    )
    total, until = 0.0, datetime.datetime.min
    for start, stop in busy:
        total += max(0.0, (stop - max(start, until)).total_seconds())
        until = max(until, stop)
    return total
