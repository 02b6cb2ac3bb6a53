"""Handling of SIGTERM and Ctrl-C."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

REPEAT_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Time within which work heeds a request to stop; then it is interrupted where it is."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the user has asked to stop."""

    requested = False


_termination = StopRequest()
_blocks = 0


@contextlib.contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does; a no-op outside the main thread.

    Libraries may forget the exception, if it falls into one of their callbacks; `raise_if_terminated` does not.

    Args:
        once: ignore SIGTERM after the first, so that putting a trial back is not interrupted in turn.
    """
    global _blocks

    def interrupt(*_: object) -> None:
        _termination.requested = True
        if once:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled(interrupt, *_SIGNALS):
        _termination.requested &= _blocks > 0  # of an earlier block
        _blocks += 1
        try:
            yield
        finally:
            _blocks -= 1


def raise_if_terminated() -> None:
    """Raise KeyboardInterrupt again in a block whose interrupt was forgotten; called where the work may well end."""
    if _termination.requested and _blocks and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable(notice: str) -> Iterator[StopRequest]:
    """Take the first Ctrl-C or SIGTERM inside the block as a request to stop at the next good place.

    The second one, and the first if it is not heeded within `GRACE_SECONDS`, raise KeyboardInterrupt. So does the end
    of the block, if the work was done before it heeded the request, so that no other work follows. A no-op outside the
    main thread.

    Args:
        notice: written to standard error at the first.
    """
    request = StopRequest()
    timer = threading.Timer(GRACE_SECONDS, _thread.interrupt_main)
    timer.daemon = True

    def interrupt(*_: object) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True
        os.write(2, f"\n{notice}\n".encode())  # print must not be entered from a handler, which may interrupt it
        timer.start()

    try:
        with _handled(interrupt, *_SIGNALS):
            yield request
        if request.requested:
            raise KeyboardInterrupt
    finally:
        timer.cancel()


@contextlib.contextmanager
def _handled(handler: Callable[..., None], *signals: signal.Signals) -> Iterator[None]:
    """Handle signals inside the block, unless they are ignored; a no-op outside the main thread.

    Python prints and forgets an exception that is raised inside a destructor or a weak reference's callback. An
    interrupt that falls there is raised again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def repeat(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            previous_hook(unraisable)
            return
        for number in previous:
            signal.signal(number, handler)
        # Not at once: that would be inside the callback still.
        threading.Timer(REPEAT_SECONDS, _thread.interrupt_main, (signals[-1],)).start()

    # A shell's background job is born ignoring Ctrl-C.
    previous = {n: signal.getsignal(n) for n in signals if n is signal.SIGTERM or signal.getsignal(n) != signal.SIG_IGN}
    previous_hook = sys.unraisablehook
    for number in previous:
        signal.signal(number, handler)
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        for number, handled in previous.items():
            signal.signal(number, handled)
