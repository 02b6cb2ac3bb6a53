"""One thread a test process, set before torch starts, and the interrupts of a terminal.

Two threads on busy cores wait for each other: measured, hundreds of times longer for a small net.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background with interrupts ignored, and so do its children: `make test &`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
