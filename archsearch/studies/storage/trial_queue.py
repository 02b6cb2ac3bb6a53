"""Queue of a study's trials: claims, retries and the budget, all read from and written to Optuna's trials.

A *slot* is an index of the study's plan: 0, 1, 2, … Each slot has one active trial: the running or finished one.
Earlier failures of that slot are kept but ignored. If a worker dies, its trial is failed and the slot is open again.
The storage numbers trials atomically, and slots follow from those numbers: a trial made for a new slot gets the number
of such trials before it. A trial made for an open slot records on creation which trial it replaces (``retry_of``); if
two processes do so at once, the lower number wins.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from archsearch.score import Score
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.database import database_errors
from archsearch.studies.storage.further_runs import FurtherRuns
from archsearch.studies.storage.leases import SilenceWatch, is_dead, send_heartbeat, worker_identity
from archsearch.studies.storage.outages import patience
from archsearch.studies.storage.record import TrialRecord
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.errors import InputError

MAX_INFEASIBLE_IN_A_ROW = 50
"""The study ends after this many consecutive candidates outside the limits."""

DONE = "done"
"""Phase of a trial whose score is complete; only its state may still have to be set."""


class Budget(NamedTuple):
    """The rest of a study's budget.

    Attributes:
        proposes: whether a new candidate may begin.
        lasts: whether any trial may begin; one that continues a candidate may when no new one does.
        reason: why the study is over, if no trial is running.
    """

    proposes: bool
    lasts: bool
    reason: str | None

    def allows(self, attempts: Sequence[TrialRecord]) -> bool:
        """Whether a slot may be tried again after some trials; one that was reopened may at any time."""
        lasts = self.lasts if attempts[0].continues is not None else self.proposes
        return lasts or any(t.reopens for t in attempts)


class TrialQueue:
    """Queue of one study's trials, as used by one of its workers."""

    def __init__(self, study: Study, settings: StudyConfig) -> None:
        self.study, self._settings = study, settings
        self._storage: BaseStorage = study._storage
        self._further_runs = FurtherRuns(settings)
        self._watch = SilenceWatch(self._storage, study._study_id)
        self._created: set[int] = set()
        self._in_database = not isinstance(self._storage, InMemoryStorage)
        self.known = StudyTrials(study)
        """All trials made by a worker, as of the last read."""

    def trials(self) -> StudyTrials:
        """All trials made by a worker, as they are now."""
        return self.known.read()

    # Claiming

    def claim(self) -> TrialRecord | str | None:
        """Claim the next slot by a new trial: the lowest open slot, else a new one, while the budget lasts.

        A new slot is for a new candidate, or for one that is trained further; the trial then continues that one's.

        Returns:
            The trial; the reason if the study is over; None if there is no slot to claim at the moment, while another
            worker's trial may still fail and so open one.
        """
        trials = self.reap_dead()
        budget = self._budget(trials)
        opened = [slot for slot, attempts in trials.open_slots.items() if budget.allows(attempts)]
        retried = trials.open_slots[min(opened)][0] if opened else None
        further = self._further_runs.next(trials, proposing=budget.proposes) if budget.lasts and not retried else None
        continued = retried.continues if retried else further
        if not (budget.proposes or retried) and continued is None:
            return budget.reason
        trial_id = self._create(retry_of=retried.number if retried else None, continues=continued)
        trials = self.trials()
        claimed = next(t for t in reversed(trials) if t.trial_id == trial_id)
        earlier = (t for t in trials.running.values() if t.number < claimed.number)
        if trials.active.get(claimed.slot) is not claimed or (
            continued is not None and any(t.continues == continued for t in earlier)
        ):
            TrialRecord.end(self._storage, trial_id, lost=True)
            return self.claim()
        if continued is None and not self._budget(trials, before=claimed).allows(trials.by_slot[claimed.slot]):
            # Another worker claimed the last trial of the budget between our check and our claim.
            self.release(trial_id)
            return None
        try:
            self.write(trial_id, slot=claimed.slot)
        except UpdateFinishedTrialError:  # this process was stopped so long that others took it for dead
            return self.claim()
        return claimed

    def _create(self, **fields: int | None) -> int:
        given = {name: number for name, number in fields.items() if number is not None}
        waiting: dict[str, Any] = {"worker": worker_identity(), "phase": "waiting", "fraction": 0.0}
        trial_id = TrialRecord.create(self.study, "RUNNING", **waiting, **given)
        self._created.add(trial_id)
        send_heartbeat(self._storage, trial_id)
        return trial_id

    def _budget(self, trials: StudyTrials, before: TrialRecord | None = None) -> Budget:
        """Determine what is left of the budget.

        Args:
            before: leave out this trial and those after it, and the time, which this trial has begun to spend: at the
                end of the budget it would be released, and claimed again, for ever.
        """
        settings = self._settings
        end = math.inf if before is None else before.number
        late = [] if before is None else trials.since(before.number)
        scored = len(trials.scored) - sum(trials.scored.get(t.slot) is t for t in late)
        running = [t for t in trials.running.values() if trials.active[t.slot] is t and t.number < end]
        begun = scored + sum(t.continues is None for t in running)
        proposes, lasts = settings.trials is None or begun < settings.trials, True
        reason = f"{scored} candidates {'scored' if settings.rungs is None else 'tried'}"
        if settings.time_budget_minutes is not None and before is None:
            seconds_left = 60 * settings.time_budget_minutes - trials.busy_seconds()
            duration = trials.median_seconds() or 0
            further = self._further_runs.count(trials) / len(settings.first_seeds) / settings.workers
            reason = f"{settings.time_budget_minutes:g} minutes spent, {reason}" if proposes else reason
            lasts = seconds_left > duration
            proposes = proposes and seconds_left > duration * (1 + further)
        active = (trials.active.get(slot) for slot in reversed(trials.by_slot))
        ended = (t for t in active if t is not None and t.state != "running" and t.number < end)
        tail = itertools.takewhile(lambda t: t.state == "infeasible", ended)
        if proposes and len(list(itertools.islice(tail, MAX_INFEASIBLE_IN_A_ROW))) == MAX_INFEASIBLE_IN_A_ROW:
            proposes = False
            reason = f"the last {MAX_INFEASIBLE_IN_A_ROW} candidates were all outside the limits; widen them"
        return Budget(proposes=proposes, lasts=lasts, reason=None if running else reason)

    def reopen(self) -> int:
        """Reopen the slots that were given up, whose earlier failures no longer count; returns their number."""
        trials = self.trials()
        given_up = [attempts[0] for slot, attempts in trials.by_slot.items() if trials.is_given_up(slot)]
        for first in given_up:
            continued = {} if first.continues is None else {"continues": first.continues}
            again: dict[str, Any] = {"retry_of": first.number, "reopens": True, "worker": worker_identity()}
            TrialRecord.create(self.study, "FAIL", **again, **continued)
        return len(given_up)

    # Dead workers

    def reap_dead(self) -> StudyTrials:
        """Fail the running trials of dead workers, or finish those whose score was complete already.

        Returns:
            All trials after that.
        """
        silent, trials = self._watch.silent(), self.trials()
        dead = [t for t in trials.running.values() if t.trial_id in silent or is_dead(t.worker) or self._is_orphan(t)]
        for t in dead:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._settle(t)
        return self.trials() if dead else trials

    def _is_orphan(self, t: TrialRecord) -> bool:
        """Whether a trial is this worker's own, and unknown to it: the answer to its creation was lost on the way.

        No answer of a storage in memory, which several workers of one process may share, is lost.
        """
        return self._in_database and t.worker == worker_identity() and t.trial_id not in self._created

    def _settle(self, t: TrialRecord) -> None:
        if t.phase == DONE:
            self.finish(t.trial_id, t.score)
        elif t.exceeded or t.rungs:
            self.prune(t.trial_id)
        else:
            TrialRecord.end(self._storage, t.trial_id)

    # Writing

    def write(self, trial_id: int, **fields: Any) -> None:
        """Store fields of a trial's record; see `StoredTrial.write`."""
        TrialRecord.write(self._storage, trial_id, **fields)

    def set_constraint(self, trial_id: int, name: str, excess: float) -> None:
        """Record the value of a constraint, unless it has one: feasible at 0 and below."""
        trial = optuna.trial.Trial(self.study, trial_id)
        if name not in trial.constraints:
            trial.set_constraint(name, excess)

    def set_point(self, trial_id: int, point: Mapping[str, int], choices: Mapping[str, Any]) -> None:
        """Set the parameters of a trial to the names of a point's choices, as Optuna's own tools show them.

        Args:
            choices: distribution of each knob's index, for a study without names, or that began with indices.
        """
        for name, index in point.items():
            try:
                self._storage.set_trial_param(trial_id, name, index, self._named_choices.get(name, choices[name]))
            except ValueError:
                self._storage.set_trial_param(trial_id, name, index, choices[name])

    @cached_property
    def _named_choices(self) -> Mapping[str, BaseDistribution]:
        knobs = self.study.user_attrs.get("space", {}).get("knobs", ())
        return {knob["name"]: CategoricalDistribution(knob["choices"]) for knob in knobs}

    def finish(self, trial_id: int, score: Score) -> None:
        """Complete a trial with the objectives' values of its score."""
        values = [score.value(name) for name in self._settings.objectives]
        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)

    def prune(self, trial_id: int, **fields: Any) -> None:
        """Store fields of a trial, the limits that it exceeds or its rung, and end it: PRUNED, without values."""
        self.write(trial_id, **fields)
        self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def release(self, trial_id: int) -> None:
        """Reopen the slot of a trial; this does not count as a failure of its candidate."""
        TrialRecord.end(self._storage, trial_id, withdrawn=True)

    def release_own(self) -> None:
        """Release every trial that this process has claimed and not ended.

        If the database cannot be written, now that this process ends, others release them when it has ended.
        """
        with contextlib.suppress(InputError, *database_errors()), patience(0):
            for t in list(self.trials().running.values()):
                if t.worker == worker_identity():
                    self.release(t.trial_id)

    def fail(self, trial_id: int, error: str, *, killed: bool = False) -> None:
        """End a trial because scoring raised, or the machine killed its worker; retried until `is_abandoned`."""
        TrialRecord.end(self._storage, trial_id, error=error, killed=killed)

    def reject(self, trial_id: int, error: str) -> None:
        """End a trial whose candidate cannot be scored at all; the slot is not retried."""
        TrialRecord.end(self._storage, trial_id, error=error, rejected=True)
