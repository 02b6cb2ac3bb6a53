from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from archsearch.latency.steady_state import RunTimes, SteadyStateConfig, median_interval, time_until_steady


class Clock:
    """A clock that only runs move, and the run that moves it."""

    def __init__(self, times: Iterator[float], *, waits: float = 0) -> None:
        self.now, self.taken, self._times, self._waits = 0.0, 0, times, waits

    def run(self) -> float:
        seconds = next(self._times)
        self.now += seconds + self._waits
        self.taken += 1
        return seconds


def settled(time_of: Callable[[int], float], *, waits: float = 0, **rule: float) -> tuple[RunTimes, Clock]:
    clock = Clock((time_of(i) for i in range(10**7)), waits=waits)
    return time_until_steady(clock.run, SteadyStateConfig.model_validate(rule), clock=lambda: clock.now), clock


def noisy(milliseconds: float, spread: float, seed: int = 0) -> Callable[[int], float]:
    rng = np.random.default_rng(seed)
    return lambda _: float(milliseconds * 1e-3 * (1 + spread * rng.standard_normal()))


def test_quiet_runs_settle_at_once() -> None:
    timing, clock = settled(noisy(1, 0.01))
    assert timing.steady
    assert timing.quartiles()[1] == pytest.approx(1e-3, rel=0.005)
    assert clock.now < 0.5, "six blocks of 50 ms and little more"


def test_quartiles_are_in_order() -> None:
    lower, median, upper = settled(noisy(3, 0.1))[0].quartiles()
    assert lower < median < upper
    assert (lower, upper) == pytest.approx((3e-3 * (1 - 0.0675), 3e-3 * (1 + 0.0675)), rel=0.03)


def test_warm_up_is_dropped() -> None:
    timing, _ = settled(lambda i: 1e-3 * (1 + 9 * 0.98**i))
    assert timing.steady
    assert max(timing.runs) < 1.5e-3, "it began at 10 ms"
    assert timing.quartiles()[1] == pytest.approx(1e-3, rel=0.04)


def test_the_first_run_never_counts() -> None:
    timing, _ = settled(lambda i: 3.0 if i == 0 else 1e-3, seconds=60)
    assert timing.steady
    assert max(timing.runs) == 1e-3


def test_outliers_move_nothing() -> None:
    timing, _ = settled(lambda i: 0.1 if i % 10 == 9 else 2e-3, seconds=20)
    assert timing.steady
    assert timing.quartiles() == (2e-3, 2e-3, 2e-3)


def test_more_noise_takes_more_runs() -> None:
    runs = [len(settled(noisy(50, spread), seconds=100)[0].runs) for spread in (0.001, 0.06)]
    assert runs[0] < runs[1]


def test_drift_is_not_steady() -> None:
    timing, clock = settled(lambda i: 1e-3 * 1.002**i, seconds=2)
    assert not timing.steady
    assert 2 <= clock.now < 2.5


def test_two_modes_by_turns_are_not_steady() -> None:
    timing, _ = settled(lambda i: 1e-3 if (i // 50) % 2 else 1.5e-3, seconds=2)
    assert not timing.steady


def test_a_late_mode_is_outvoted_or_marked_unsteady() -> None:
    timing, _ = settled(lambda i: 1e-3 if i > 150 else 1.5e-3, seconds=4)
    assert timing.quartiles()[1] == 1e-3 or not timing.steady


def test_never_settling_ends_on_time_without_the_first_half() -> None:
    # Every third block is twice as slow, so that no three in a row agree.
    timing, clock = settled(lambda i: 1e-2 if ((i - 2) // 5) % 3 else 2e-2, seconds=1)
    assert not timing.steady
    assert clock.now < 1.2
    assert len(timing.runs) < 0.6 * clock.taken


def test_slow_nets_take_few_runs() -> None:
    timing, clock = settled(noisy(10_000, 0.002), seconds=4)
    assert timing.steady
    assert len(timing.runs) == 3
    assert clock.taken == 5
    timing, _ = settled(lambda i: 10.0 * 1.3**i, seconds=4)
    assert not timing.steady
    assert len(timing.runs) >= 2


def test_waiting_for_a_core_uses_up_the_limit_but_is_not_in_the_times() -> None:
    timing, clock = settled(noisy(5, 0.2), waits=0.05, seconds=3)
    assert clock.now == pytest.approx(3, rel=0.3)
    assert timing.quartiles()[1] == pytest.approx(5e-3, rel=0.1)


def test_instant_runs_end() -> None:
    timing, clock = settled(lambda _: 0.0, waits=1e-6)
    assert timing.steady
    assert clock.taken < 10**6


@pytest.mark.parametrize("n", [6, 10, 20, 100])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    held = 0
    for sample in rng.lognormal(0, 1, (2000, n)):
        low, high = median_interval(list(sample))
        held += low <= 1 <= high
    assert 0.93 < held / 2000 < 0.99
