"""An interrupt reaches the code that puts a trial back, wherever it falls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref

import pytest

from archsearch.studies import signals
from archsearch.studies.signals import raise_if_terminated, stoppable, terminable


class Referent:
    pass


def interrupted_in_callback(once: bool) -> None:
    """Fall into a weak reference's callback, where Python forgets exceptions, then wait for the interrupt."""
    referent = Referent()
    reference = weakref.ref(referent, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with terminable(once=once):
        del referent
        assert reference() is None
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.mark.parametrize("once", [False, True])
def test_an_interrupt_that_python_forgets_is_raised_again(once: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_in_callback(once)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("once", [False, True])
def test_an_interrupt_that_a_library_forgets_is_not_lost(once: bool, number: int) -> None:
    """It falls into a callback of a library that catches everything."""

    def work() -> None:
        with terminable(once=once):
            raise_if_terminated()
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), number)
            raise_if_terminated()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                work()
        raise_if_terminated()
        with terminable():
            raise_if_terminated()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_interrupt_what_the_first_one_started() -> None:
    released = False
    with terminable(once=True):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            released = True
    assert released
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)

    def ask_twice() -> None:
        with stoppable("stopping soon") as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert capfd.readouterr().err == "\nstopping soon\n"
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        ask_twice()
    assert signal.getsignal(number) == before


def test_a_request_that_is_not_heeded_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)

    def ask_and_work_on() -> None:
        with stoppable("stopping soon"):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        ask_and_work_on()


def test_a_request_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that was done before it heeded the request is followed by no other work, and the timer is off."""
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)
    done = []

    def ask_at_the_end() -> None:
        with stoppable("stopping soon") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        ask_at_the_end()
    assert done
    time.sleep(0.2)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable("stopping soon") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)
