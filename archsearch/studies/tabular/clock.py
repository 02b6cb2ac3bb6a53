"""Simulated time for workers that are threads of one process."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence


class SimulatedClock:
    """Time that passes only while all workers wait.

    One worker runs at a time, from one call of `sleep` to its next, so a simulation is deterministic.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._turn = threading.Condition()
        self._order = itertools.count()
        self._sleeping: list[tuple[float, int, int]] = []
        self._idle: list[int] = []
        self._running: int | None = None
        self._errors: list[BaseException] = []

    def run(self, workers: Sequence[Callable[[], object]]) -> None:
        """Run workers, each in a thread, until all of them have returned.

        Raises:
            BaseException: the first that a worker raised; the others end at their next `sleep`.
        """
        threads = []
        for number, worker in enumerate(workers):
            self._wake(number, self.now)
            threads.append(threading.Thread(target=self._run, args=(number, worker), daemon=True))
        for thread in threads:
            thread.start()
        with self._turn:
            self._hand_over()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def sleep(self, seconds: float) -> None:
        """Let time pass for the worker that runs, and let others run meanwhile."""
        with self._turn:
            number = self._current()
            self._wake_idle()
            self._wake(number, self.now + seconds)
            self._pass_turn(number)

    def wait(self) -> None:
        """Wait until another worker that slept has had its turn."""
        with self._turn:
            number = self._current()
            assert self._sleeping, "all workers wait for each other"
            self._idle.append(number)
            self._pass_turn(number)

    def _current(self) -> int:
        assert self._running is not None, "only a worker that runs may wait"
        return self._running

    def _wake(self, number: int, at: float) -> None:
        heapq.heappush(self._sleeping, (at, next(self._order), number))

    def _wake_idle(self) -> None:
        for number in self._idle:
            self._wake(number, self.now)
        self._idle.clear()

    def _pass_turn(self, number: int) -> None:
        self._hand_over()
        self._turn.wait_for(lambda: self._running == number)
        if self._errors:
            raise SystemExit

    def _hand_over(self) -> None:
        """Let the worker run whose time is the earliest."""
        self._running = None
        if self._sleeping:
            self.now, _, self._running = heapq.heappop(self._sleeping)
        self._turn.notify_all()

    def _run(self, number: int, worker: Callable[[], object]) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == number)
        try:
            if not self._errors:
                worker()
        except SystemExit:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            with self._turn:
                self._wake_idle()
                self._hand_over()
