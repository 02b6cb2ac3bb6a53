"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes ``path`` once all is written, and is removed if that fails."""
    part = path.with_suffix(path.suffix + ".part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        if part.is_file():
            part.unlink()
        raise
