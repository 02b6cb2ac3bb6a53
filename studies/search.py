"""Run a study, or go on with it: prepare once, then score candidates in one process or in several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from snapgen.errors import InputError
from studies import sampler
from studies.interrupts import terminable
from studies.ledger import Ledger
from studies.progress import Display
from studies.proposal import Proposer, ProposerFactory
from studies.scorer import ArchsearchScorer, ScorerFactory
from studies.settings import StudySettings, named_in
from studies.storage import artifact_store, begun, existing, refused
from studies.trials import read
from studies.worker import Worker

if TYPE_CHECKING:
    from optuna import Study

    from spaces.space import Space

CRASHES = 5
"""So many worker processes lost in one run, and the search stops."""

POLL_SECONDS = 0.3
PATIENCE_SECONDS = 20
"""For workers to put their trial back after Ctrl-C."""


def search(
    settings: StudySettings,
    *,
    quiet: bool = False,
    scorer: ScorerFactory = ArchsearchScorer,
    proposer: ProposerFactory = Proposer,
) -> Study:
    """Run a study to the end of its budget, from wherever it is.

    The same call goes on with a study that was killed, and any number of processes, on any number of machines, may run
    it together. One worker alone ends with the same trials whether or when it was killed, if its scores are
    deterministic.

    Args:
        quiet: show warnings only.
        scorer: makes what scores the candidates; a function or class of a module.
        proposer: makes what proposes them, in a study of one worker.

    Returns:
        The study, as Optuna has it.

    Raises:
        InputError: if something is wrong with the settings or what they name.
        KeyboardInterrupt: once the trials under way have been put back.
    """
    with refused(settings.url, settings.source), terminable(), _no_warnings():
        space = settings.load_space()
        _check_plan(settings, space, proposer)
        sampler.make(settings.sampler, seed=0, source=settings.source)
        ready = scorer(settings, space)
        with named_in(settings, "space"):
            ready.check(space.base)
        study = begun(settings, {"space": space.to_dict(), **ready.describe()})
        artifact_store(study)  # a folder that cannot be written is told now, not after the first training
        with Display(study, settings, quiet=quiet) as display:
            display.line(f"{settings.name}: {space.size():,} points, in {settings.url}", warning=False)
            if settings.workers == 1:
                with _threads(settings.threads):
                    asked = proposer(settings, space)
                    worker = Worker(study, settings, space, ready, asked, tell=display.line, tick=display.tick)
                    reason = worker.run()
            else:
                del ready
                reason = _Crew(study, settings, scorer, display).run()
            display.tick(now=True)
            display.line(f"{settings.name}: finished, {reason}", warning=False)
        _refuse_nothing(study, settings, reason)
    return study


def _check_plan(settings: StudySettings, space: Space, proposer: ProposerFactory) -> None:
    if settings.ablation is not None and not settings.plan:
        raise InputError(settings.source, "is an ablation", "run archsearch ablate", place="ablation")
    if settings.evolve is not None and proposer is Proposer:
        raise InputError(settings.source, "evolves a network", "run archsearch evolve", place="evolve")
    choices = {knob.name: range(len(knob.choices)) for knob in space.knobs}
    for i, point in enumerate(settings.plan):
        known = point.keys() == choices.keys() and all(point[name] in choices[name] for name in choices)
        if not known or not space.valid(point):
            remedy = "give every knob the index of one of its choices"
            raise InputError(settings.source, "is no point of the space", remedy, place=f"plan[{i}]")


def _refuse_nothing(study: Study, settings: StudySettings, reason: str) -> None:
    """A study that scored nothing for its limits has nothing to report but how far off they were."""
    candidates = read(study)
    near = [c for c in candidates if c.state == "infeasible"]
    if near and not any(c.state == "scored" for c in candidates):
        problem = f"{reason}; none was inside, e.g. trial {near[-1].number}: {near[-1].infeasible}"
        raise InputError(settings.source, problem.replace("; widen them", ""), "widen the limits", place="limits")


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Optuna calls heartbeats and metric names experimental; that says nothing to whoever runs a study."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Crew:
    """Worker processes of this machine, each on one candidate at a time."""

    def __init__(self, study: Study, settings: StudySettings, scorer: ScorerFactory, display: Display) -> None:
        self._study, self._settings, self._scorer, self._display = study, settings, scorer, display
        self._context = multiprocessing.get_context("spawn")
        self._messages: Any = self._context.Queue()
        self._workers: dict[int, BaseProcess] = {}
        self._reasons: list[str] = []
        self._crashes = 0

    def run(self) -> str:
        """Until every worker says that the study is finished."""
        try:
            for index in range(self._settings.workers):
                self._start(index)
            while self._workers:
                wait([w.sentinel for w in self._workers.values()], timeout=POLL_SECONDS)
                self._listen()
                self._look()
                self._display.tick()
        except BaseException:
            self._stop()
            raise
        self._listen()
        return self._reasons[-1] if self._reasons else "stopped"

    def _start(self, index: int) -> None:
        arguments = (self._settings, self._scorer, self._messages)
        worker = self._context.Process(target=work, args=arguments, name=f"worker {index}", daemon=False)
        with _environment(OMP_NUM_THREADS=str(self._settings.threads)):
            worker.start()
        self._workers[index] = worker

    def _listen(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, content = self._messages.get(timeout=0.01)
                if kind == "line":
                    self._display.line(content)
                elif kind == "finished":
                    self._reasons.append(content)
                else:
                    raise content

    def _look(self) -> None:
        for index, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[index]
            if worker.exitcode == 0:
                continue
            self._listen()  # it may have said why
            self._crashes += 1
            how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"status {worker.exitcode}"
            if self._crashes >= CRASHES:
                problem = f"{CRASHES} workers died, the last with {how}"
                raise InputError(self._settings.source, problem, "use fewer workers or smaller candidates")
            self._display.line(f"worker {index} died ({how}){self._its_trial(worker, how)}; another takes over")
            self._start(index)

    def _its_trial(self, worker: BaseProcess, how: str) -> str:
        """Fail the trial that a worker died in: twice, and the candidate is given up."""
        ledger = Ledger(self._study, self._settings)
        running = [t for t in ledger.trials() if t.state.name == "RUNNING"]
        mine = [t for t in running if t.user_attrs["worker"]["pid"] == worker.pid]
        for t in mine:
            ledger.crash(t._trial_id, f"its worker died ({how})")
        return f" in trial {mine[-1].number}" if mine else ""

    def _stop(self) -> None:
        """Let every worker put its trial back; whoever does not in time is ended, and its trial run again later."""
        until = time.monotonic() + PATIENCE_SECONDS
        for worker in self._workers.values():
            if worker.is_alive() and worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)
        for worker in self._workers.values():
            worker.join(max(0.1, until - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def work(settings: StudySettings, scorer: ScorerFactory, messages: Any) -> None:
    """What a worker process does. It says how it ended through ``messages``: a line, a reason, or an InputError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which tells us in its own time
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(settings.threads)
    try:
        with refused(settings.url, settings.source), _no_warnings():
            space = settings.load_space()
            worker = Worker(
                existing(settings),
                settings,
                space,
                scorer(settings, space),
                Proposer(settings, space),
                tell=lambda text: messages.put(("line", text)),
            )
            messages.put(("finished", worker.run()))
    except InputError as error:
        messages.put(("error", error))
    except KeyboardInterrupt:
        pass


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: putting the trial back must not be interrupted
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """A worker does not outlive a killed parent: the same command, given again, starts workers of its own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
    sys.exit()
