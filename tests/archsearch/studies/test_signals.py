"""An interrupt reaches the code that puts a trial back, wherever it falls."""

from __future__ import annotations

import os
import signal
import time
import weakref

import pytest

from archsearch.studies.signals import terminable


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
