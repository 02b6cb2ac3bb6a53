"""Who works on which slot: claims, retries and the budget, all read from and written to Optuna's trials.

A *slot* is a place in the study's plan: 0, 1, 2, … Each has one trial that counts: the one that runs or has finished.
Trials of a slot whose worker died are failed, and the slot is open again. A trial's number is given by the storage,
atomically, and so is the slot of a trial made for a new one: the number of such trials before it. A trial made for an
open slot says at birth whose place it takes (`retry_of`); should two processes do so at once, the lower number stays.
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

CRASHES = 2
"""A candidate whose scoring raised, or ended its worker process, so often is given up.

A search that was killed as a whole says nothing about the candidate it was at.
"""

INFEASIBLE_IN_A_ROW = 50

DONE = "done"
"""The stage of a trial of which all is known; only telling it may be left."""


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial of ours, for one slot. ``point`` is set if the slot was tried before and its candidate is known."""

    trial_id: int
    number: int
    slot: int
    point: Mapping[str, int] | None


@dataclass(frozen=True)
class NothingToDo:
    """Nothing to do unless a trial of another worker comes to nothing."""


@dataclass(frozen=True)
class BudgetSpent:
    """The study is over; why, in words."""

    reason: str


class TrialQueue:
    """The trials of one study, for one of the workers on it."""

    def __init__(self, study: Study, settings: StudyConfig) -> None:
        self.study, self._settings = study, settings
        self._storage: BaseStorage = study._storage
        self._id = self._storage.get_study_id_from_name(study.study_name)

    # Reading

    def trials(self) -> list[FrozenTrial]:
        """All trials that a worker of ours made, by number. Others (e.g. added by hand) are left alone."""
        every = self._storage.get_all_trials(self._id, deepcopy=False)
        return [t for t in every if "worker" in t.user_attrs]

    def current(self, trials: Sequence[FrozenTrial] | None = None) -> dict[int, FrozenTrial]:
        """The trial that counts of every slot that has one, in the order of the slots."""
        trials = self.trials() if trials is None else trials
        slots = slots_of(trials)
        taken: dict[int, FrozenTrial] = {}
        for t in trials:
            if t.state.name != "FAIL":
                taken.setdefault(slots[t.number], t)
        return dict(sorted(taken.items()))

    # Claiming

    def claim(self) -> ClaimedTrial | NothingToDo | BudgetSpent:
        """The next slot to work on: the lowest open one, else a new one, while the budget lasts."""
        self.bury()
        trials = self.trials()
        if verdict := self._over(trials):
            return verdict
        opened = open_slots(trials)
        slot = min(opened, default=None)
        past = opened.get(slot, []) if slot is not None else []
        attrs: dict[str, Any] = {"worker": worker_identity(), "stage": "waiting", "fraction": 0.0}
        if past:
            attrs["retry_of"] = past[0].number
        trial_id, number = self._create(attrs)
        trials = self.trials()
        if past and self.current(trials)[slots_of(trials)[number]].number != number:
            end_trial(self._storage, trial_id, "FAIL", lost=True)
            return self.claim()
        if self._over([t for t in trials if t.number < number]):
            # Another worker took the last place between our look and our claim.
            self.withdraw(trial_id)
            return NothingToDo()
        slot = slots_of(trials)[number]
        self.note(trial_id, slot=slot)
        points = [t.params for t in past if "architecture" in t.user_attrs]
        return ClaimedTrial(trial_id, number, slot, points[-1] if points else None)

    def _create(self, attrs: Mapping[str, Any]) -> tuple[int, int]:
        from optuna.trial import TrialState, create_trial

        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attrs))
        trial_id = self._storage.create_new_trial(self._id, template_trial=template)
        send_heartbeat(self._storage, trial_id)
        return trial_id, self._storage.get_trial(trial_id).number

    def _over(self, trials: Sequence[FrozenTrial]) -> NothingToDo | BudgetSpent | None:
        settings, now = self._settings, self.current(trials)
        scored = [t for t in now.values() if is_scored(t)]
        running = [t for t in now.values() if t.state.name == "RUNNING"]
        full = settings.trials is not None and len(scored) + len(running) >= settings.trials
        reason = f"{len(scored)} candidates scored"
        if not full and settings.minutes is not None:
            left = 60 * settings.minutes - busy_seconds(trials)
            full = left <= (statistics.median(map(seconds, scored)) if scored else 0)
            reason = f"{settings.minutes:g} minutes spent, {reason}"
        if full:
            return NothingToDo() if running else BudgetSpent(reason)
        ended = [t for t in now.values() if t.state.name != "RUNNING"]
        tail = itertools.takewhile(lambda t: t.state.name == "PRUNED", reversed(ended))
        if len(list(tail)) >= INFEASIBLE_IN_A_ROW:
            return BudgetSpent(f"the last {INFEASIBLE_IN_A_ROW} candidates were all outside the limits; widen them")
        return None

    # The dead

    def bury(self) -> None:
        """Fail what dead workers left, or finish it where all was known already."""
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
            self.prune(t._trial_id)
        else:
            end_trial(self._storage, t._trial_id, "FAIL")

    # Writing

    def note(self, trial_id: int, **attrs: Any) -> None:
        """Set user attributes.

        Raises:
            optuna.exceptions.UpdateFinishedTrialError: if others have taken us for dead.
        """
        for key, value in attrs.items():
            self._storage.set_trial_user_attr(trial_id, key, value)

    def constrain(self, trial_id: int, name: str, excess: float) -> None:
        """Tell a constraint: feasible at 0 and below."""
        import optuna

        trial = optuna.trial.Trial(self.study, trial_id)
        if name not in trial.constraints:
            trial.set_constraint(name, excess)

    def set_point(self, trial_id: int, point: Mapping[str, int], choices: Mapping[str, Any]) -> None:
        """Set the parameters."""
        for name, value in point.items():
            internal = choices[name].to_internal_repr(value)
            self._storage.set_trial_param(trial_id, name, internal, choices[name])

    def set_system_attrs(self, trial_id: int, attrs: Mapping[str, Any]) -> None:
        """Keep what the sampler wants to find again."""
        for key, value in attrs.items():
            self._storage.set_trial_system_attr(trial_id, key, value)

    def finish(self, trial_id: int, values: Sequence[float]) -> None:
        """Tell the objectives' values."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def prune(self, trial_id: int) -> None:
        """Tell that a candidate is outside the limits. Its constraints say by how much; it has no values."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def withdraw(self, trial_id: int) -> None:
        """Give a slot back; it is open again, and this does not count as a failure."""
        end_trial(self._storage, trial_id, "FAIL", withdrawn=True)

    def crash(self, trial_id: int, error: str) -> None:
        """Say that scoring failed, and how."""
        end_trial(self._storage, trial_id, "FAIL", error=error)

    def refuse(self, trial_id: int, error: str) -> None:
        """Say that this candidate can not be scored, and that trying again is no use."""
        end_trial(self._storage, trial_id, "FAIL", error=error, refused=True)


def slots_of(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """The slot of every trial, by its number; from what is fixed when a trial is made, so all workers agree."""
    slots: dict[int, int] = {}
    new = itertools.count()
    for t in sorted(trials, key=lambda t: t.number):
        first = t.user_attrs.get("retry_of")
        slots[t.number] = next(new) if first is None else slots[first]
    return slots


def open_slots(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """The slots whose trials have all failed and which are not given up, with those trials by number."""
    slots = slots_of(trials)
    by_slot: dict[int, list[FrozenTrial]] = {}
    for t in trials:
        by_slot.setdefault(slots[t.number], []).append(t)
    return {
        slot: tried
        for slot, tried in by_slot.items()
        if all(t.state.name == "FAIL" for t in tried) and not is_abandoned(tried)
    }


def is_abandoned(tried: Sequence[FrozenTrial]) -> bool:
    """Whether a slot's trials failed too often to try again, or for a reason that will not go away."""
    return sum("error" in t.user_attrs for t in tried) >= CRASHES or any("refused" in t.user_attrs for t in tried)


def values_of(score: Score, objectives: Sequence[str]) -> list[float]:
    """The numbers that a study minimises."""
    return [OBJECTIVES[name].getter(score) for name in objectives]


def is_scored(t: FrozenTrial) -> bool:
    """Whether a trial counts against the budget: scored, and not a known architecture over again."""
    return t.state.name == "COMPLETE" and t.user_attrs.get("reused_from") is None


def seconds(t: FrozenTrial) -> float:
    """How long a trial took, or has taken so far."""
    until = t.datetime_complete or datetime.datetime.now()
    return (until - t.datetime_start).total_seconds() if t.datetime_start else 0.0


def busy_seconds(trials: Sequence[FrozenTrial]) -> float:
    """Time in which any worker was busy, over all runs of the study. What the dead took is not counted."""
    now = datetime.datetime.now()
    busy = sorted(
        (t.datetime_start, t.datetime_complete or now) for t in trials if t.state.name != "FAIL" and t.datetime_start
    )
    total, until = 0.0, datetime.datetime.min
    for start, stop in busy:
        total += max(0.0, (stop - max(start, until)).total_seconds())
        until = max(until, stop)
    return total
