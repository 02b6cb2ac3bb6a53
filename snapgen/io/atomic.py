"""Atomic writes: files and folders are written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from snapgen.errors import InputError, first_line

STALE_SECONDS = 24 * 3600
"""Age from which a temporary file is one that a killed process left."""


@contextmanager
def write_errors(path: Path, remedy: str) -> Iterator[None]:
    """Report an error in writing ``path``, of the operating system or as safetensors words it, as one of the user's."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(path, f"cannot be written ({reason})", remedy) from None


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader finds either the old or the new content.

    Raises:
        InputError: if the file cannot be written.
    """
    atomic_write_texts({path: text})


def atomic_write_texts(files: Mapping[Path, str]) -> None:
    """Write text files that belong together: none takes its place before all of them are written.

    Raises:
        InputError: if a file cannot be written; then all are as they were.
    """
    with contextlib.ExitStack() as parts:
        for path, text in files.items():
            parts.enter_context(write_errors(path, "name a writable file"))
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            parts.enter_context(atomic_write(path)).write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, delete it on failure.

    Several processes may write the same file at once: the last one wins. What killed ones left is removed.
    """
    remove_stale(path.parent, f"{glob.escape(path.name)}.[0-9]*-????????.part")
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove the temporary files and folders that processes left which were killed long ago."""
    for temporary in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def check_writable(path: Path) -> None:
    """Check, before long work, that a file or a folder can be made at ``path``; nothing is made.

    Raises:
        InputError: if it cannot.
    """
    beside = next(parent for parent in path.absolute().parents if parent.exists())
    if not beside.is_dir():
        raise InputError(path, f"cannot be written ({beside} is not a folder)", "name another place")
    if not os.access(beside, os.W_OK | os.X_OK):
        raise InputError(path, f"cannot be written (no permission to write in {beside})", "name another place")


def check_new_folder(path: Path) -> None:
    """Check, before long work, that ``path`` can become a new folder; nothing is made.

    Raises:
        InputError: if it cannot, or there is something that is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(path, "already exists", "name a new folder")
    check_writable(path)


@contextmanager
def atomic_folder(
    path: Path, *, replace: bool = False, remedy: str = "free disk space, or name another folder"
) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` on success, delete it on failure.

    Folders that were made to hold it are deleted on failure, too.

    Args:
        path: the folder.
        replace: whether a folder that is there is replaced.
        remedy: what to do where the folder cannot be written.

    Raises:
        InputError: if ``path`` exists and is not an empty folder, or if it cannot be written.
    """
    if not replace:
        check_new_folder(path)
    made = [parent for parent in path.parents if not parent.exists()]
    with write_errors(path, remedy):
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            yield temporary
            temporary.chmod(0o755)
            old = temporary.with_name(f"{temporary.name}.old")
            if path.is_dir():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in made:
                    parent.rmdir()
            raise
