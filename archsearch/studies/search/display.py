"""Progress of a running search: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Self

from optuna import Study
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from archsearch.score import OBJECTIVES
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.storage.further_runs import FurtherRuns
from archsearch.studies.storage.ranking import competes
from archsearch.studies.storage.record import Candidate
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.progress import SECONDS_OF_SILENCE, format_duration

REFRESH_SECONDS = 1.0

MIN_FRACTION = 0.05
"""Share of a running trial from which its own duration is estimated, where none has ended."""


class Display:
    """Shows a study's progress, which it reads from the storage at each `tick`, at most once per `REFRESH_SECONDS`.

    Args:
        quiet: whether to show only warnings, and the state of the study once a minute.
    """

    def __init__(self, study: Study, settings: StudyConfig, *, quiet: bool) -> None:
        self._settings, self._quiet = settings, quiet
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._total: TaskID | None = None
        self._read_at, self._line_at = 0.0, time.monotonic()
        self._trials = StudyTrials(study)
        self._best: Candidate | None = None
        self._further_runs = FurtherRuns(settings)
        # A small space ends before its trials do; known candidates are points of it and do not count.
        new_points = settings.load_space().size() - len(study.user_attrs.get("start", ()))
        self._wanted = None if settings.trials is None else min(settings.trials, new_points)
        for _ in self._new_candidates():
            pass  # an earlier run has shown them

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._bars = _bars()
            self._bars.start()
            self._total = self._bars.add_task("search", total=1.0, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def line(self, text: str, *, warning: bool = True) -> None:
        """Print a line above the bars."""
        if self._quiet and not warning:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
            self._line_at = time.monotonic()

    def tick(self, *, now: bool = False) -> None:
        """Read what has changed and show it."""
        is_silent = self._bars is None and time.monotonic() - self._line_at >= SECONDS_OF_SILENCE
        if not is_silent and (self._quiet or (not now and time.monotonic() - self._read_at < REFRESH_SECONDS)):
            return
        for c in self._new_candidates():
            self.line(self._outcome(c), warning=False)
        if self._bars is not None:
            self._draw()
        elif is_silent:
            steps = "".join(f"; trial {c.number}: {c.phase}, {c.fraction:.0%}" for c in self._running())
            self.line(f"{self._settings.name}: {self._state()}{steps}")
        self._read_at = time.monotonic()

    def _new_candidates(self) -> Iterator[Candidate]:
        """Candidates whose trials have ended with a result since the last time, with the totals as of each."""
        for t in self._trials.changes():
            if isinstance(t, Candidate) and t.state in ("scored", "infeasible", "paused"):
                best = self._best
                if best is not None and t.continues == (best.number if best.continues is None else best.continues):
                    found = self._trials.candidates()  # another seed may make the best one worse than an earlier one
                else:
                    found = [t] if best is None else [best, t]
                ranked = [c for c in found if competes(c)]
                self._best = min(ranked, key=lambda c: c.value(self._settings.objectives[0]), default=None)
                yield t

    def _running(self) -> list[Candidate]:
        active = [t for t in self._trials.running.values() if self._trials.active[t.slot] is t]
        return [t for t in active if isinstance(t, Candidate)]

    def _outcome(self, c: Candidate) -> str:
        trial = f"trial {c.number}" + (f" ({c.name})" if c.name else "")
        if c.state == "infeasible":
            return f"{trial}: outside the limits: {c.infeasible}"
        if c.state == "paused":
            trial += f", trial {c.continues}" if c.continues is not None else ""
            loss = f"validation loss {c.rungs[-1].quality.validation_loss.value:.4g} there"
            return f"{trial}: {c.phase} of {self._settings.protocol.steps}, {loss}, {c.seconds:.0f} s"
        shown = ", ".join(format_value(c, name) for name in self._settings.objectives)
        if c.reused_from is not None:
            return f"{trial}: {shown}; the architecture of trial {c.reused_from}"
        if c.reused_study is not None:
            trial += f", the quality of {c.reused_study}"
        if c.continues is not None:
            trial += f", trial {c.continues} " + (f"with {c.runs} seeds" if c.runs > 1 else "to the end")
        return f"{trial}: {shown}, {c.seconds:.0f} s; {self._state()}"

    def _state(self) -> str:
        """Summary of the study, e.g. ``5 of 14 scored, best validation loss 0.41, 3 min left``."""
        scored = len(self._trials.scored)
        done = "scored" if self._settings.rungs is None else "tried"
        phrases = [f"{scored} of {self._wanted} {done}" if self._wanted is not None else f"{scored} {done}"]
        if self._best is not None:
            phrases.append("best " + format_value(self._best, self._settings.objectives[0]))
        left = self._seconds_left()
        if left is not None:
            phrases.append(f"{format_duration(left)} left")
        return ", ".join(phrases)

    def _seconds_left(self) -> float | None:
        settings, estimates = self._settings, []
        if settings.time_budget_minutes is not None:
            estimates.append(60 * settings.time_budget_minutes - self._trials.busy_seconds())
        under_way = self._running()
        begun = [c.seconds / c.fraction for c in under_way if c.fraction > MIN_FRACTION]
        median = self._trials.median_seconds() or (statistics.median(begun) if begun else None)
        if self._wanted is not None and median is not None:
            running = sum(min(c.seconds / median, 1) for c in under_way)
            further = self._further_runs.count(self._trials) / len(settings.first_seeds)
            left = max(0, self._wanted - len(self._trials.scored)) + further - running
            estimates.append(left * median / settings.workers)
        return max(0.0, min(estimates)) if estimates else None

    def _fraction(self) -> float:
        running = sum(c.fraction for c in self._running() if c.continues is None)
        if self._wanted is not None:
            return min(1.0, (len(self._trials.scored) + running) / max(1, self._wanted))
        assert self._settings.time_budget_minutes is not None
        return min(1.0, self._trials.busy_seconds() / (60 * self._settings.time_budget_minutes))

    def _draw(self) -> None:
        assert self._bars is not None
        assert self._total is not None
        self._bars.update(self._total, completed=self._fraction(), note=self._state())
        running = {c.slot: c for c in self._running()}
        for slot in self._tasks.keys() - running.keys():
            self._bars.remove_task(self._tasks.pop(slot))
        for slot, c in running.items():
            if slot not in self._tasks:
                self._tasks[slot] = self._bars.add_task(f"trial {c.number}", total=1.0, note="")
            self._bars.update(self._tasks[slot], completed=c.fraction, note=c.phase)


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True)


def format_value(c: Candidate, name: str) -> str:
    """One number of a candidate with its label, and with the interval of a prediction."""
    label, value, unit, latency = c.label(name), c.value(name), OBJECTIVES[name].unit, c.score.latency
    if name == "latency_ms" and latency and latency.source == "predicted":
        low, high = latency.estimate.low, latency.estimate.high
        return f"{label} {value:.4g} {unit} ({latency.interval_name} {low:.4g} to {high:.4g})"
    if name in ("params", "macs", "activation_bytes"):
        return f"{label} {value / 1e6:.3g} M{unit}"
    return f"{label} {value:.4g} {unit}".rstrip()
