"""Run one part in a separate process with a time limit."""

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
"""Time for a process to end by itself after SIGTERM."""


class Ending(NamedTuple):
    """State and duration of a part that has ended, and the reason if it is not done."""

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
    """Run a command and append its output to a log.

    Args:
        command: the command line.
        seconds: time limit; the command is then ended with all processes that it started.
        log: file that the output is appended to.
        environment: environment variables of the command.
        changed: called whenever the file ``watched`` changes.
        watched: file to watch.

    Raises:
        KeyboardInterrupt: if it arrives while the command runs; the command is ended first.
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
    elapsed = time.monotonic() - began
    if state == "cut off":
        return Ending("cut off", f"its time limit of {seconds:.0f} s was reached; the results are incomplete", elapsed)
    if process.returncode == 0:
        return Ending("done", "", elapsed)
    status = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
    return Ending("failed", f"its process ended with {status}: {last_line(log, start)}", elapsed)


def _wait(
    process: subprocess.Popen[bytes], until: float, changed: Callable[[], None], watched: Path | None
) -> Literal["ended", "cut off"]:
    last_stamp = _stamp(watched)
    while process.poll() is None:
        if time.monotonic() >= until:
            return "cut off"
        time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))
        stamp = _stamp(watched)
        if stamp != last_stamp:
            last_stamp = stamp
            changed()
    return "ended"


def _stamp(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all processes that it started: by SIGTERM, then by SIGKILL."""
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


def last_line(log: Path, start: int) -> str:
    """Last line that a process printed, preferably one that names an error."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]
