"""Trials of a study as its workers see them: by number, by slot and by architecture, kept from one read to the next."""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Iterator, Sequence
from typing import overload

from optuna import Study

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.ranking import Ranking, Row
from archsearch.studies.storage.record import Candidate, TrialReader, TrialRecord, fold, read_trial

MAX_FAILURES = 2
"""A candidate is abandoned once its scoring has raised, or ended its worker process, this many times.

A search that is killed as a whole does not count against the candidate it was scoring.
"""

MAX_KILLED = 5
"""The limit where the machine killed the worker: others may have used the memory that the candidate needed."""


class StudyTrials(Sequence[TrialRecord]):
    """All trials made by a worker, by number, as of the last `read`.

    A read costs time for the trials that run or are new, whatever the size of the study.

    Attributes:
        by_slot: the trials of each slot, by number, in the order of the slots.
        active: the active trial of every slot that has one.
        open_slots: slots whose trials have all failed and that are not abandoned, each with those trials by number.
        scored: the active trials that count against the budget, by slot; a paused one does.
        running: the trials that run, by number.
        ended: the trials that have ended, in the order in which they were read; it only grows.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._reader = TrialReader(study, lambda t: read_trial(study, t, self._slots, new_slot=len(self.by_slot)))
        self._records: list[TrialRecord] = []
        self._positions: dict[int, int] = {}
        self._slots: dict[int, int] = {}
        self._by_architecture: dict[str, dict[int, TrialRecord]] = {}
        self._further: dict[int, dict[int, TrialRecord]] = {}
        self._candidates: dict[int, Candidate] = {}
        self._rows: list[Row] = []
        self._ranking: Ranking | None = None
        self._continuing_slots: list[int] = []
        self._busy = BusyTime()
        self._seconds: list[float] = []
        self._timed: set[int] = set()
        self.by_slot: dict[int, list[TrialRecord]] = {}
        self.active: dict[int, TrialRecord] = {}
        self.open_slots: dict[int, list[TrialRecord]] = {}
        self.scored: dict[int, TrialRecord] = {}
        self.running: dict[int, TrialRecord] = {}
        self.ended: list[TrialRecord] = []

    @overload
    def __getitem__(self, index: int) -> TrialRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrialRecord]: ...
    def __getitem__(self, index: int | slice) -> TrialRecord | list[TrialRecord]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def read(self) -> StudyTrials:
        """Read what has changed.

        Raises:
            InputError: if a trial's attributes are damaged.
        """
        for _ in self.changes():
            pass
        return self

    def changes(self) -> Iterator[TrialRecord]:
        """Read what has changed, trial by trial, as of which everything is then; call it again when it has ended.

        Raises:
            InputError: if a trial's attributes are damaged.
        """
        for record in self._reader.changes():
            self._file(record)
            yield record

    def since(self, number: int) -> list[TrialRecord]:
        """The trials from a number on."""
        return self._records[bisect.bisect_left(self._records, number, key=lambda t: t.number) :]

    def of_architecture(self, architecture_id: str) -> list[TrialRecord]:
        """The trials of one architecture, by number."""
        return [t for _, t in sorted(self._by_architecture.get(architecture_id, {}).items())]

    def place(self, slot: int) -> int:
        """Number of slots before a slot that are for new candidates."""
        return slot - bisect.bisect_left(self._continuing_slots, slot)

    def candidate(self, number: int) -> TrialRecord:
        """A trial of a new candidate, with the score of all its seeds so far."""
        first: TrialRecord = self._records[self._positions[number]]
        if number not in self._further:
            return first
        folded: list[TrialRecord] = fold([first, *self._further[number].values()])
        return folded[0]

    def candidates(self) -> list[Candidate]:
        """The active trials of new candidates, by slot, with the scores of all their seeds so far."""
        return [self._candidates[slot] for slot in sorted(self._candidates)]

    def continued(self) -> set[int]:
        """Numbers of the trials that another one continues without an end yet: it runs, or it was given up."""
        begun = ((slot, self.by_slot[slot][0]) for slot in self._continuing_slots)
        return {t.continues for slot, t in begun if t.continues is not None and not t.lost and not self._ended(slot)}

    def ranking(self, settings: StudyConfig) -> Ranking:
        """The candidates as they stand under the study's settings; kept until something changes."""
        if self._ranking is None:
            self._ranking = Ranking(settings, self.candidates(), known=self._rows)
        return self._ranking

    def is_given_up(self, slot: int) -> bool:
        """Whether a slot is abandoned because of what its trials did, rather than taken by two workers at once."""
        ended = slot not in self.active and slot not in self.open_slots
        return ended and not any(t.lost and t.retry_of is None for t in self.by_slot[slot])

    def median_seconds(self) -> float | None:
        """Median duration of the candidates that count against the budget and did not stay paused; None without one."""
        count = len(self._seconds)
        return (self._seconds[(count - 1) // 2] + self._seconds[count // 2]) / 2 if count else None

    def busy_seconds(self) -> float:
        """Seconds in which at least one worker was busy, over all runs of the study; failed trials are not counted."""
        return self._busy.seconds([t.started for t in self.running.values() if t.started])

    def _ended(self, slot: int) -> bool:
        return slot in self.active and self.active[slot].state in ("scored", "paused")

    def _file(self, t: TrialRecord) -> None:
        self._ranking = None
        attempts = self.by_slot.setdefault(t.slot, [])
        if t.number in self._positions:
            before = self._records[self._positions[t.number]]
            self._records[self._positions[t.number]] = t
            attempts[attempts.index(before)] = t
            if before.architecture_id is not None:
                del self._by_architecture[before.architecture_id][t.number]
        else:
            self._positions[t.number], self._slots[t.number] = len(self._records), t.slot
            self._records.append(t)
            attempts.append(t)
            if t.continues is not None and t.retry_of is None:
                self._continuing_slots.append(t.slot)
        if t.architecture_id is not None:
            self._by_architecture.setdefault(t.architecture_id, {})[t.number] = t
        if t.state in ("waiting", "running"):
            self.running[t.number] = t
        else:
            self.running.pop(t.number, None)
            self.ended.append(t)
            if t.state != "failed" and t.started and t.ended:
                self._busy.add(t.started, t.ended)
        self._settle(t.slot)

    def _settle(self, slot: int) -> None:
        """Set what follows from the trials of a slot."""
        attempts = self.by_slot[slot]
        active = next((t for t in attempts if t.state != "failed"), None)
        for which in (self.active, self.open_slots):
            which.pop(slot, None)
        if active is not None:
            self.active[slot] = active
            if active.continues is not None and active.state in ("scored", "paused"):
                self._further.setdefault(active.continues, {})[active.number] = active
            if active.uses_budget and slot not in self.scored:
                self.scored[slot] = active
            ends_a_paused_run = (
                active.continues is not None
                and active.runs == 1
                and self._records[self._positions[active.continues]].state == "paused"
            )
            if (active.uses_budget or ends_a_paused_run) and active.state == "scored" and slot not in self._timed:
                self._timed.add(slot)
                first = active.number if active.continues is None else active.continues
                bisect.insort(self._seconds, self.candidate(first).seconds)
        elif not is_abandoned(attempts):
            self.open_slots[slot] = attempts
        if active is None or active.continues is None:
            self._set_candidate(slot, active)
        else:
            continued: TrialRecord = self._records[self._positions[active.continues]]
            self._set_candidate(continued.slot, self.active.get(continued.slot))

    def _set_candidate(self, slot: int, active: TrialRecord | None) -> None:
        """Set the candidate of a slot that is for a new one."""
        candidate = self.candidate(active.number) if active is not None else None
        if isinstance(candidate, Candidate):
            self._candidates[slot] = candidate
        else:
            self._candidates.pop(slot, None)


def is_abandoned(attempts: Sequence[TrialRecord]) -> bool:
    """Whether a slot's trials failed too often to be retried, or one was rejected, since the slot was last reopened."""
    reopened = max((i for i, t in enumerate(attempts) if t.reopens), default=-1)
    since = attempts[reopened + 1 :]
    failures = sum(t.error is not None and not t.killed for t in since)
    killed = sum(t.killed for t in since)
    duplicate = any(t.lost and t.retry_of is None for t in attempts)  # another worker continues the same trial
    return failures >= MAX_FAILURES or killed >= MAX_KILLED or duplicate or any(t.rejected for t in since)


class BusyTime:
    """Time covered by at least one of several intervals."""

    def __init__(self) -> None:
        self._pieces: list[tuple[datetime.datetime, datetime.datetime]] = []
        self._total = 0.0

    def add(self, start: datetime.datetime, stop: datetime.datetime) -> None:
        """Add an interval."""
        first = last = bisect.bisect_left(self._pieces, start, key=lambda piece: piece[1])
        while last < len(self._pieces) and self._pieces[last][0] <= stop:
            start, stop = min(start, self._pieces[last][0]), max(stop, self._pieces[last][1])
            last += 1
        self._total += _seconds(start, stop) - sum(_seconds(*piece) for piece in self._pieces[first:last])
        self._pieces[first:last] = [(start, stop)]

    def seconds(self, running_since: Sequence[datetime.datetime] = ()) -> float:
        """Seconds that are covered, with intervals that have begun and not ended."""
        if not running_since:
            return self._total
        start, now = min(running_since), datetime.datetime.now()
        later = self._pieces[bisect.bisect_left(self._pieces, start, key=lambda piece: piece[1]) :]
        return self._total - sum(_seconds(max(start, a), b) for a, b in later) + max(0.0, _seconds(start, now))


def _seconds(start: datetime.datetime, stop: datetime.datetime) -> float:
    return (stop - start).total_seconds()
