"""Runs one part in a process of its own, until it ends or its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["done", "skipped", "failed", "cut off", "interrupted", "not begun"]

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""For a process to end by itself once it was told to."""


class Ending(NamedTuple):
    """How a part ended."""

    state: State
    reason: str
    seconds: float


def run(
    command: Sequence[str],
    *,
    seconds: float,
    log: Path,
    environment: Mapping[str, str],
    changed: Callable[[], None] = lambda: None,
    watched: Path | None = None,
) -> Ending:
    """Run a command, its output added to a log.

    Args:
        seconds: after which it is ended, with all processes that it started.
        changed: called whenever the file ``watched`` is another than before.

    Raises:
        KeyboardInterrupt: once the command is ended, if that comes while it runs.
    """
    began = time.monotonic()
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            state = _wait(process, began + seconds, changed, watched)
        finally:
            _end(process)
    taken = time.monotonic() - began
    if state == "cut off":
        return Ending("cut off", f"its time of {seconds:.0f} s was up; what stands here was obtained before", taken)
    if process.returncode == 0:
        return Ending("done", "", taken)
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return Ending("failed", f"its process ended with {how}: {last_words(log, start)}", taken)


def _wait(
    process: subprocess.Popen[bytes], until: float, changed: Callable[[], None], watched: Path | None
) -> Literal["ended", "cut off"]:
    seen = _stamp(watched)
    while process.poll() is None:
        if time.monotonic() >= until:
            return "cut off"
        time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
        now = _stamp(watched)
        if now != seen:
            seen = now
            changed()
    return "ended"


def _stamp(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def last_words(log: Path, start: int) -> str:
    """The last line that a process printed, if it is worth showing; an out-of-memory error is said as such."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line]
    return (telling or lines or ["it printed nothing"])[-1][:300]
