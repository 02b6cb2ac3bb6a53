"""Reading of files that users name: regular ones of a bounded size.

A named pipe would be waited for, and a device such as ``/dev/zero`` never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from snapgen.errors import InputError, os_errors

MAX_BYTES = 1 << 28
"""Largest file, of a picture, a table or text, that is read whole."""


MAX_HEADER = 1 << 22
"""Largest header of a safetensors file; that of SDXL's U-Net has a twentieth."""


def open_regular(path: Path) -> int:
    """Open a regular file for reading, without waiting for the writer of a named pipe; returns its descriptor.

    Raises:
        OSError: if it cannot be opened or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: Path) -> None:
    """Check that a file is a regular one, without opening it.

    A database that this process may have open must not be opened here: closing it would release SQLite's locks on it.

    Raises:
        OSError: if it does not exist or is no regular file.
    """
    _check_mode(path.stat().st_mode)


def _check_mode(mode: int) -> None:
    if not stat.S_ISREG(mode):
        is_folder = stat.S_ISDIR(mode)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR)) if is_folder else OSError(None, "is not a regular file")


def check_header(path: Path) -> None:
    """Check that a safetensors file is a regular one whose header, which is read whole, is of at most `MAX_HEADER`.

    Raises:
        OSError: if not.
    """
    with open(open_regular(path), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise OSError(None, f"a header of {size:,} bytes, more than {MAX_HEADER:,}")


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most ``max_bytes``.

    Raises:
        OSError: if it cannot be read, is no regular file, or is larger.
    """
    with open(open_regular(path), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(None, f"is too large (more than {max_bytes:,} bytes)")
    return content


def read_text(path: Path, remedy: str = "name a readable file", max_bytes: int = MAX_BYTES) -> str:
    """Read a regular file of text, of at most ``max_bytes``.

    Raises:
        InputError: if it is missing, cannot be read, is no regular file, too large, or not UTF-8.
    """
    try:
        with os_errors(path, remedy, "cannot be read"):
            return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise InputError(path, "is not text (not UTF-8)", remedy, place=f"byte {error.start}") from None
