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
from typing import TYPE_CHECKING, Any, NamedTuple

from archsearch.score import OBJECTIVES, Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.further_runs import FurtherRuns
from archsearch.studies.storage.leases import is_dead, send_heartbeat, worker_identity
from archsearch.studies.storage.record import TrialRecord, read_trials

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

MAX_FAILURES = 2
"""A candidate is abandoned once its scoring has raised, or ended its worker process, this many times.

A search that is killed as a whole does not count against the candidate it was scoring.
"""

MAX_INFEASIBLE_IN_A_ROW = 50
"""The study ends after this many consecutive candidates outside the limits."""

DONE = "done"
"""Phase of a trial whose score is complete; only its state may still have to be set."""


class Budget(NamedTuple):
    """What is left of a study's budget.

    Attributes:
        proposes: whether a new candidate may begin.
        lasts: whether any trial may begin; a further seed of a candidate may when no new one does.
        reason: why the study is over, if no trial is running.
    """

    proposes: bool
    lasts: bool
    reason: str | None

    def allows(self, retried: TrialRecord) -> bool:
        """Whether a trial may be run again."""
        return self.lasts if retried.continues is not None else self.proposes


class TrialQueue:
    """Queue of one study's trials, as used by one of its workers."""

    def __init__(self, study: Study, settings: StudyConfig) -> None:
        self.study, self._settings = study, settings
        self._storage: BaseStorage = study._storage
        self._ended: dict[int, TrialRecord] = {}
        self._further_runs = FurtherRuns(settings)

    def trials(self) -> list[TrialRecord]:
        """All trials made by a worker, by number."""
        return read_trials(self.study, self._ended)

    # Claiming

    def claim(self) -> TrialRecord | str | None:
        """Claim the next slot by a new trial: the lowest open slot, else a new one, while the budget lasts.

        A new slot is for a new candidate, or for a further seed of one that is scored; the trial then continues that
        one's.

        Returns:
            The trial; the reason if the study is over; None if there is no slot to claim at the moment, while another
            worker's trial may still fail and so open one.
        """
        self.reap_dead()
        trials = self.trials()
        budget = self._budget(trials)
        opened = {slot: a for slot, a in open_slots(trials).items() if budget.allows(a[0])}
        retried = opened[min(opened)][0] if opened else None
        continued = retried.continues if retried else self._continued(trials, budget)
        if not budget.proposes and continued is None:
            return budget.reason
        trial_id = self._create(retry_of=retried.number if retried else None, continues=continued)
        trials = self.trials()
        claimed = next(t for t in trials if t.trial_id == trial_id)
        earlier = [t for t in trials if t.number < claimed.number]
        if retried is not None and active_trials(trials)[claimed.slot] is not claimed:
            TrialRecord.end(self._storage, trial_id, lost=True)
            return self.claim()
        if continued is not None and any(t.continues == continued and t.state == "running" for t in earlier):
            TrialRecord.end(self._storage, trial_id, lost=True)
            return self.claim()
        if continued is None and not self._budget(earlier).proposes:
            # Another worker claimed the last trial of the budget between our check and our claim.
            self.release(trial_id)
            return None
        self.write(trial_id, slot=claimed.slot)
        return claimed

    def _create(self, **fields: int | None) -> int:
        given = {name: number for name, number in fields.items() if number is not None}
        waiting: dict[str, Any] = {"worker": worker_identity(), "phase": "waiting", "fraction": 0.0}
        trial_id = TrialRecord.create(self.study, "RUNNING", **waiting, **given)
        send_heartbeat(self._storage, trial_id)
        return trial_id

    def _continued(self, trials: Sequence[TrialRecord], budget: Budget) -> int | None:
        return self._further_runs.next(trials, proposing=budget.proposes) if budget.lasts else None

    def _budget(self, trials: Sequence[TrialRecord]) -> Budget:
        settings, active = self._settings, active_trials(trials).values()
        scored = [t for t in active if t.uses_budget]
        running = [t for t in active if t.state == "running"]
        begun = len(scored) + sum(t.continues is None for t in running)
        proposes, lasts = settings.trials is None or begun < settings.trials, True
        reason = f"{len(scored)} candidates scored"
        if settings.time_budget_minutes is not None:
            seconds_left = 60 * settings.time_budget_minutes - busy_seconds(trials)
            duration = statistics.median(t.seconds for t in scored) if scored else 0
            further = self._further_runs.count(trials) / len(settings.first_seeds) / settings.workers
            reason = f"{settings.time_budget_minutes:g} minutes spent, {reason}" if proposes else reason
            lasts = seconds_left > duration
            proposes = proposes and seconds_left > duration * (1 + further)
        ended = [t for t in active if t.state != "running"]
        tail = itertools.takewhile(lambda t: t.state == "infeasible", reversed(ended))
        if proposes and len(list(tail)) >= MAX_INFEASIBLE_IN_A_ROW:
            proposes = False
            reason = f"the last {MAX_INFEASIBLE_IN_A_ROW} candidates were all outside the limits; widen them"
        return Budget(proposes=proposes, lasts=lasts, reason=None if running else reason)

    # Dead workers

    def reap_dead(self) -> None:
        """Fail the running trials of dead workers, or finish those whose score was complete already."""
        import optuna

        with contextlib.suppress(NotImplementedError):
            optuna.storages.fail_stale_trials(self.study)
        for t in self.trials():
            if t.state == "running" and is_dead(t.worker):
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._settle(t)

    def _settle(self, t: TrialRecord) -> None:
        if t.phase == DONE:
            self.finish(t.trial_id, t.score)
        elif t.exceeded:
            self.mark_infeasible(t.trial_id)
        else:
            TrialRecord.end(self._storage, t.trial_id)

    # Writing

    def write(self, trial_id: int, **fields: Any) -> None:
        """Store fields of a trial's record; see `StoredTrial.write`."""
        TrialRecord.write(self._storage, trial_id, **fields)

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

    def finish(self, trial_id: int, score: Score) -> None:
        """Complete a trial with the objectives' values of its score."""
        from optuna.trial import TrialState

        values = [OBJECTIVES[name].getter(score) for name in self._settings.objectives]
        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def mark_infeasible(self, trial_id: int) -> None:
        """End a trial whose candidate is outside the limits: PRUNED, without values; its constraints say why."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def release(self, trial_id: int) -> None:
        """Reopen the slot of a trial; this does not count as a failure of its candidate."""
        TrialRecord.end(self._storage, trial_id, withdrawn=True)

    def release_own(self) -> None:
        """Release every trial that this process has claimed and not ended."""
        for t in self.trials():
            if t.state == "running" and t.worker == worker_identity():
                self.release(t.trial_id)

    def fail(self, trial_id: int, error: str) -> None:
        """End a trial because scoring raised; the slot is retried until `MAX_FAILURES`."""
        TrialRecord.end(self._storage, trial_id, error=error)

    def reject(self, trial_id: int, error: str) -> None:
        """End a trial whose candidate cannot be scored at all; the slot is not retried."""
        TrialRecord.end(self._storage, trial_id, error=error, rejected=True)


def by_slot(trials: Sequence[TrialRecord]) -> dict[int, list[TrialRecord]]:
    """The trials of each slot, by number, in the order of the slots."""
    slots: dict[int, list[TrialRecord]] = {}
    for t in trials:
        slots.setdefault(t.slot, []).append(t)
    return dict(sorted(slots.items()))


def active_trials(trials: Sequence[TrialRecord]) -> dict[int, TrialRecord]:
    """The active trial of every slot that has one, in the order of the slots."""
    active = {slot: [t for t in attempts if t.state != "failed"] for slot, attempts in by_slot(trials).items()}
    return {slot: attempts[0] for slot, attempts in active.items() if attempts}


def open_slots(trials: Sequence[TrialRecord]) -> dict[int, list[TrialRecord]]:
    """Slots whose trials have all failed and that are not abandoned, each with those trials by number."""
    return {
        slot: attempts
        for slot, attempts in by_slot(trials).items()
        if all(t.state == "failed" for t in attempts) and not is_abandoned(attempts)
    }


def is_abandoned(attempts: Sequence[TrialRecord]) -> bool:
    """Whether a slot's trials failed too often to be retried, or one was rejected for good."""
    failures = sum(t.error is not None for t in attempts)
    duplicate = any(t.lost and t.retry_of is None for t in attempts)  # another worker continues the same trial
    return failures >= MAX_FAILURES or duplicate or any(t.rejected for t in attempts)


def busy_seconds(trials: Sequence[TrialRecord]) -> float:
    """Seconds in which at least one worker was busy, over all runs of the study; failed trials are not counted."""
    now = datetime.datetime.now()
    busy = sorted((t.started, t.ended or now) for t in trials if t.state != "failed" and t.started)
    total, until = 0.0, datetime.datetime.min
    for start, stop in busy:
        total += max(0.0, (stop - max(start, until)).total_seconds())
        until = max(until, stop)
    return total
