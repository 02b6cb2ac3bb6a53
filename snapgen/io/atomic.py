"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapgen.errors import InputError


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a reader finds the old one or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be written").lower(), "name a writable file") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes ``path`` once all is written, and is removed if that fails."""
    part = path.with_suffix(path.suffix + ".part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        if part.is_file():
            part.unlink()
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``path`` once all is written, and is removed if that fails.

    Raises:
        InputError: if ``path`` is there already and no empty folder, or cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(path, "is there already", "name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise InputError(path, (error.strerror or "cannot be written").lower(), "name another folder") from None
    try:
        yield part
        part.chmod(0o755)
        part.replace(path)
    except BaseException:
        shutil.rmtree(part)
        raise
