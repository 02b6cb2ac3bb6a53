"""Content digests of what a protocol or a recipe names by path: sets of files, and nets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snapgen import files
from snapgen.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Sets of files up to this total size are hashed by content, larger ones by name, size and modification time.
HASHED_BYTES = 1 << 30
CHECKSUMS = "SHA256SUMS"
"""File of a folder's checksums, in the format of ``sha256sum``."""


def digest_files(paths: Sequence[Path], names: Iterable[str]) -> str:
    """Hash files and names to 16 hex digits.

    Files are hashed by content up to `HASHED_BYTES` in total, beyond that by name, size and modification time.

    Args:
        paths: the files, in a fixed order.
        names: further text to include, e.g. captions.
    """
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    stats = [_size_and_time(path) for path in paths]
    small = sum(size for size, _ in stats) <= HASHED_BYTES
    for path, stat in zip(paths, stats, strict=True):
        digest.update(_content(path) if small else f"{path.name}\0{stat}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def digest_contents(paths: Iterable[Path], text: str = "") -> str:
    """Hash a text and the contents of files of any size, one after another, to 16 hex digits."""
    digest = hashlib.sha256(text.encode())
    for path in paths:
        with open(files.open_regular(path), "rb") as file:  # noqa: PTH123 - a descriptor
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into it, for `check_checksums` and ``sha256sum -c``.

    A model card is not among them: its author fills in what is missing.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    lines = [f"{_content(path).hex()}  {path.relative_to(folder)}\n" for path in paths]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path, remedy: str) -> None:
    """Check that the files of a folder are those that `write_checksums` found; a folder without checksums passes.

    Raises:
        InputError: naming the first file that is missing or differs.
    """
    sums = folder / CHECKSUMS
    for line in files.read_text(sums, remedy).splitlines() if sums.exists() else []:
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise InputError(folder / name, "is missing", remedy)
        if _content(folder / name).hex() != expected:
            problem = f"is damaged or was changed (its SHA-256 is not that in {CHECKSUMS})"
            raise InputError(folder / name, problem, remedy)


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names and values of tensors on the CPU, in the given order, to 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a dangling link; the image counts as damaged when it is decoded
        return 0, 0
    return stat.st_size, int(stat.st_mtime)


def _content(path: Path) -> bytes:
    try:
        with open(files.open_regular(path), "rb") as file:  # noqa: PTH123 - a descriptor
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # the image counts as damaged when it is decoded
        return b"unreadable"
