"""One thread a test process, set before torch starts.

Two threads on busy cores wait for each other: measured, hundreds of times longer for a small net.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
