"""Digests of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

# Sources up to this size are hashed by content, larger ones by names, sizes and times of change.
HASHED_BYTES = 1 << 30


def digest_files(paths: Sequence[Path], names: Iterable[str]) -> str:
    """16 hex digits of a hash of the files (`HASHED_BYTES`) and of ``names``."""
    total = hashlib.sha256()
    for name in names:
        total.update(name.encode(errors="surrogateescape") + b"\n")
    facts = [_size_and_time(path) for path in paths]
    small = sum(size for size, _ in facts) <= HASHED_BYTES
    for path, fact in zip(paths, facts, strict=True):
        total.update(_content(path) if small else f"{path.name}\0{fact}\n".encode(errors="surrogateescape"))
    return total.hexdigest()[:16]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        fact = path.stat()
    except OSError:  # a link to nowhere: counted as damaged when it is decoded
        return 0, 0
    return fact.st_size, int(fact.st_mtime)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # counted as damaged when it is decoded
        return b"unreadable"
