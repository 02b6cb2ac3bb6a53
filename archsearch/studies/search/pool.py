"""Worker processes of a search."""

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

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.display import Display
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.scorer import ScorerFactory
from archsearch.studies.search.worker import Worker
from archsearch.studies.storage.database import load_study, storage_errors
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.errors import InputError

if TYPE_CHECKING:
    from optuna import Study


CRASHES = 5
"""So many worker processes lost in one run, and the search stops."""


POLL_SECONDS = 0.3


PATIENCE_SECONDS = 20
"""For workers to put their trial back after Ctrl-C."""


def work(settings: StudyConfig, scorer: ScorerFactory, messages: Any) -> None:
    """What a worker process does. It says how it ended through ``messages``: a line, a reason, or an InputError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which tells us in its own time
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(settings.threads)
    try:
        with storage_errors(settings.url, settings.source), ignore_experimental_warnings():
            space = settings.load_space()
            worker = Worker(
                load_study(settings),
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


@contextlib.contextmanager
def ignore_experimental_warnings() -> Iterator[None]:
    """Optuna calls heartbeats and metric names experimental; that says nothing to whoever runs a study."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WorkerPool:
    """Worker processes of this machine, each on one candidate at a time."""

    def __init__(self, study: Study, settings: StudyConfig, scorer: ScorerFactory, display: Display) -> None:
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
        ledger = TrialQueue(self._study, self._settings)
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
