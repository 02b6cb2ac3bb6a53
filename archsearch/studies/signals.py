"""Handling of SIGTERM."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

REPEAT_SECONDS = 0.05


@contextlib.contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does; a no-op outside the main thread.

    Python prints and forgets an exception that is raised inside a destructor or a weak reference's callback. An
    interrupt that falls there is raised again a moment later.

    Args:
        once: ignore SIGTERM after the first, so that putting a trial back is not interrupted in turn.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        if once:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    def repeat(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            previous_hook(unraisable)
            return
        signal.signal(signal.SIGTERM, interrupt)
        # Not at once: that would be inside the callback still.
        threading.Timer(REPEAT_SECONDS, _thread.interrupt_main, (signal.SIGTERM,)).start()

    previous, previous_hook = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, previous)
