"""Faults of the machine, told from those of what runs on it: a full disk is no architecture's fault."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

import psutil

from snapgen.errors import InputError, first_line

_DISK, _RIGHTS = "free disk space", "make it writable"
_FILES = "close other programs, or raise the limit on open files (ulimit -n)"
_MEMORY = "free memory, or use fewer workers"
_REMEDIES = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EFBIG: _DISK,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: "check the disk",
    errno.ENOMEM: _MEMORY,
}
_IN_WORDS = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in _REMEDIES)
    + "|can't start new thread|PytorchStreamWriter failed|unexpected pos ",
    re.IGNORECASE,
)
"""How libraries word such an error that raise no `OSError`: ONNX Runtime, safetensors, torch."""

_OUT_OF_MEMORY = re.compile(r"allocate memory|bad_alloc|\b(CUDA|MPS|XPU)\b.*out of memory|unable to allocate", re.I)
_REQUESTED = re.compile(r"allocate ([\d.]+) (bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CONNECTIONS = ConnectionError, TimeoutError
"""Errors of the operating system that a program at the other end can cause."""


class MachineFault(InputError):
    """The machine lacks disk space, memory, files or permissions: whatever ran into it may be run again."""


def machine_fault(error: BaseException) -> MachineFault | None:
    """The machine's fault behind an error, in one line; None if the error may be that of what was run.

    Memory is the machine's fault where others hold most of it; a net that needs more than half is too large.
    """
    for cause in _chain(error):
        if isinstance(cause, MachineFault):
            return cause
        if _is_out_of_memory(cause):
            return None if _takes_most(cause) else _fault(f"out of memory ({first_line(cause)})", _MEMORY)
        if isinstance(cause, OSError) and not isinstance(cause, _CONNECTIONS):
            remedy = _REMEDIES.get(cause.errno or 0, "mend this")
            return _fault((cause.strerror or first_line(cause)).lower(), remedy, cause.filename)
        if found := _IN_WORDS.search(str(cause)):
            number = next((n for n in _REMEDIES if os.strerror(n).lower() == found[0].lower()), errno.ENOSPC)
            return _fault(first_line(cause), _MEMORY if "thread" in found[0] else _REMEDIES[number])
    return None


def _chain(error: BaseException) -> Iterator[Exception]:
    """An error and what caused it; an `InputError` hides its cause from tracebacks."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        yield cause
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, InputError) else None)


def _fault(problem: str, remedy: str, source: object = None) -> MachineFault:
    return MachineFault(str(source) if source else "this machine", problem, f"{remedy}, then give the command again")


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or _OUT_OF_MEMORY.search(str(error)) is not None


def _takes_most(error: Exception) -> bool:
    """Whether this process holds, or asked for, more than half of the memory."""
    requested = _REQUESTED.search(str(error))
    wanted = float(requested[1]) * _UNITS[requested[2]] if requested else 0.0
    if "CUDA" in str(error):
        import torch

        held, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    else:
        held, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return held + wanted > total / 2
