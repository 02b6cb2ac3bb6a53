"""A section of the file: what one part has found so far, written whole at every addition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snapgen.io.atomic import atomic_write

Block = dict[str, Any]
"""``{"text": …}``, or a table ``{"title": …, "columns": […], "rows": [[…], …]}``."""


class Section:
    """What a part says, in order, for people as Markdown blocks and for programs as raw records.

    Args:
        path: of the JSON file that the process which waits for this part reads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._blocks: list[Block] = []
        self._records: list[dict[str, Any]] = []
        self._skipped: str | None = None

    def say(self, text: str) -> None:
        """A paragraph."""
        self._blocks.append({"text": text})
        self._write()

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """A table without rows, which is shown once it has one."""
        block: Block = {"title": title, "columns": list(columns), "rows": []}
        self._blocks.append(block)
        return Table(self, block)

    def record(self, **values: Any) -> None:
        """A raw result; what is in it must be JSON."""
        self._records.append(values)
        self._write()

    def skip(self, reason: str) -> None:
        """Say that this part cannot be had here."""
        self._skipped = reason
        self._write()

    def _write(self) -> None:
        content = {"blocks": self._blocks, "records": self._records, "skipped": self._skipped}
        with atomic_write(self._path) as part:
            part.write_text(json.dumps(content, ensure_ascii=False))


class Table:
    """A table of a section, to which rows are added as they are obtained."""

    def __init__(self, section: Section, block: Block) -> None:
        self._section, self._block = section, block

    def add(self, *cells: object) -> None:
        """A row, as many cells as there are columns; None is shown as a dash."""
        assert len(cells) == len(self._block["columns"]), (cells, self._block["columns"])
        self._block["rows"].append(["–" if cell is None else str(cell) for cell in cells])
        self._section._write()


def read(path: Path) -> dict[str, Any]:
    """What a part has written so far; empty if nothing."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"blocks": [], "records": [], "skipped": None}
    return found
