from __future__ import annotations

import pytest

from archsearch.studies.tabular.clock import SimulatedClock


def test_workers_take_turns_in_the_order_of_simulated_time() -> None:
    clock, seen = SimulatedClock(), []

    def worker(name: str, *seconds: float) -> None:
        for each in seconds:
            clock.sleep(each)
            seen.append((clock.now, name))

    clock.run([lambda: worker("slow", 5.0, 5.0), lambda: worker("fast", 2.0, 2.0, 2.0, 9.0)])
    assert seen == [(2, "fast"), (4, "fast"), (5, "slow"), (6, "fast"), (10, "slow"), (15, "fast")]


def test_to_wait_is_to_wake_after_the_next_event() -> None:
    clock, seen = SimulatedClock(), []

    def waiting() -> None:
        clock.wait()
        seen.append(("waited", clock.now))

    def working() -> None:
        clock.sleep(7)
        seen.append(("worked", clock.now))

    clock.run([working, waiting])
    assert seen == [("worked", 7), ("waited", 7)]


def test_several_that_wait_let_time_pass() -> None:
    clock, seen = SimulatedClock(), []

    def waiting(name: str) -> None:
        while clock.now < 9:
            clock.wait()
            seen.append((name, clock.now))

    def working() -> None:
        for _ in range(3):
            clock.sleep(3)

    clock.run([lambda: waiting("a"), working, lambda: waiting("b")])
    assert seen == [("a", 0), ("b", 3), ("a", 3), ("b", 6), ("a", 6), ("b", 9), ("a", 9)]


def test_an_error_ends_all_workers() -> None:
    clock = SimulatedClock()

    def endless() -> None:
        while True:
            clock.sleep(1)

    def failing() -> None:
        clock.sleep(3.5)
        raise ValueError("of a worker")

    with pytest.raises(ValueError, match="of a worker"):
        clock.run([endless, failing, endless])
