"""Atomic writes: files and folders are written under a temporary name and renamed when complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapgen.errors import InputError, os_errors


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader finds either the old or the new content.

    Raises:
        InputError: if the file cannot be written.
    """
    with os_errors(path, "name a writable file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, delete it on failure."""
    temporary = path.with_suffix(path.suffix + ".part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` on success, delete it on failure.

    Raises:
        InputError: if ``path`` exists and is not an empty folder, or if it cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(path, "already exists", "name a new folder")
    with os_errors(path, "name another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
