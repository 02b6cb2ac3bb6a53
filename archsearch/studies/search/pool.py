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
import types
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from optuna import Study
from optuna.exceptions import ExperimentalWarning

from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.display import Display
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.scorer import ScorerFactory
from archsearch.studies.search.worker import Worker
from archsearch.studies.signals import raise_if_terminated, terminable
from archsearch.studies.storage.database import expect, load_study, storage_errors
from archsearch.studies.storage.leases import worker_identity
from archsearch.studies.storage.record import WorkerIdentity
from archsearch.studies.storage.trial_queue import TrialQueue
from snapgen.errors import InputError

MAX_DEAD_WORKERS = 5
"""The search stops after this many worker processes have died in one run."""

OF_THE_MACHINE = ("SIGKILL", "SIGBUS", "SIGTERM", "SIGHUP")
"""Signals that a worker gets from outside, or from a system that has no memory or disk space left."""

POLL_SECONDS = 0.3

SHUTDOWN_SECONDS = 20
"""Time that workers have to release their trials after Ctrl-C."""


def work(settings: StudyConfig, scorer: ScorerFactory, messages: Any) -> None:
    """Main function of a worker process.

    Args:
        messages: queue to the parent, of (``"line"``, log line), (``"finished"``, reason) or (``"error"``, InputError).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then sends SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads_per_worker)
    try:
        with terminable(once=True), storage_errors(settings.url, settings.source), ignore_experimental_warnings():
            expect(settings.url)
            space = settings.load_space()
            study = load_study(settings)
            worker = Worker(
                study,
                settings,
                space,
                scorer(settings, space),
                Proposer(settings, space, study),
                log=lambda text: messages.put(("line", text)),
            )
            messages.put(("finished", worker.run()))
    except InputError as error:
        messages.put(("error", error))
    except KeyboardInterrupt:
        pass


def _end_with_parent() -> None:
    """Exit when the parent is killed: the same command, given again, starts new workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
    sys.exit()


@contextlib.contextmanager
def ignore_experimental_warnings() -> Iterator[None]:
    """Suppress Optuna's warnings that heartbeats and metric names are experimental, which users cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


class WorkerPool:
    """Worker processes on this machine, each scoring one candidate at a time."""

    def __init__(self, study: Study, settings: StudyConfig, scorer: ScorerFactory, display: Display) -> None:
        self._study, self._settings, self._scorer, self._display = study, settings, scorer, display
        self._queue = TrialQueue(study, settings)
        self._context = multiprocessing.get_context("spawn")
        self._messages: Any = self._context.Queue()
        self._workers: dict[int, BaseProcess] = {}
        self._identities: dict[int, WorkerIdentity] = {}
        self._reasons: list[str] = []
        self._crashes = 0

    def run(self) -> str:
        """Run the workers until every one reports that the study is finished.

        Returns:
            Why the study is over, for the log.

        Raises:
            InputError: from a worker, or if too many workers died.
        """
        try:
            for index in range(self._settings.workers):
                self._start(index)
            while self._workers:
                wait([w.sentinel for w in self._workers.values()], timeout=POLL_SECONDS)
                raise_if_terminated()
                self._read_messages()
                self._replace_dead()
                self._display.tick()
        except BaseException:
            self._stop()
            raise
        self._read_messages()
        return self._reasons[-1] if self._reasons else "stopped"

    def _start(self, index: int) -> None:
        arguments = (self._settings, self._scorer, self._messages)
        worker = self._context.Process(target=work, args=arguments, name=f"worker {index}", daemon=False)
        with _environment(OMP_NUM_THREADS=str(self._settings.threads_per_worker)), hidden_main(self._scorer):
            worker.start()
        self._workers[index] = worker
        self._identities[index] = worker_identity(worker.pid)

    def _read_messages(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, content = self._messages.get(timeout=0.01)
                if kind == "line":
                    self._display.line(content)
                elif kind == "finished":
                    self._reasons.append(content)
                else:
                    raise content

    def _replace_dead(self) -> None:
        for index, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[index]
            if worker.exitcode == 0:
                continue
            self._read_messages()  # its last message may say why
            self._crashes += 1
            how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"status {worker.exitcode}"
            if self._crashes >= MAX_DEAD_WORKERS:
                problem = f"{MAX_DEAD_WORKERS} workers died, the last with {how}"
                raise InputError(self._settings.source, problem, "use fewer workers or smaller candidates")
            trials = [t for t in self._queue.trials().running.values() if t.worker == self._identities[index]]
            for t in trials:
                self._queue.fail(t.trial_id, f"its worker died ({how})", killed=how in OF_THE_MACHINE)
            where = f" in trial {trials[-1].number}" if trials else ""
            self._display.line(f"worker {index} died ({how}){where}; another takes over")
            self._start(index)

    def _stop(self) -> None:
        """Let every worker release its trial, then kill those that take too long; their trials are run again later."""
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for worker in self._workers.values():
            if worker.is_alive() and worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)
        for worker in self._workers.values():
            worker.join(max(0.1, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def hidden_main(scorer: ScorerFactory | None = None) -> Iterator[None]:
    """Keep new processes from importing the program that started the search: they need nothing of it.

    In a script without ``if __name__ == "__main__"`` each worker would start the search again, and a program that was
    read from standard input cannot be imported. A scorer that the program itself defines is the exception.
    """
    if getattr(scorer, "__module__", None) == "__main__":
        yield
        return
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
