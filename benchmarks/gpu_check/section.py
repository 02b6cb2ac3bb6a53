"""Section of the results: what one part has obtained so far; the file is rewritten at every addition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snapgen.io.atomic import atomic_write

Block = dict[str, Any]
"""``{"text": …}``, or a table ``{"title": …, "columns": […], "rows": [[…], …]}``."""


class Section:
    """Results of a part: Markdown blocks in order, and raw records.

    Args:
        path: JSON file, which the main process reads while the part runs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._blocks: list[Block] = []
        self._records: list[dict[str, Any]] = []
        self._skipped: str | None = None

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append({"text": text})
        self._write()

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """Add an empty table; it is shown once it has a row."""
        block: Block = {"title": title, "columns": list(columns), "rows": []}
        self._blocks.append(block)
        return Table(self, block)

    def record(self, **values: Any) -> None:
        """Add a raw record; its values must be serializable as JSON."""
        self._records.append(values)
        self._write()

    def skip(self, reason: str) -> None:
        """Mark the part as skipped."""
        self._skipped = reason
        self._write()

    def _write(self) -> None:
        content = {"blocks": self._blocks, "records": self._records, "skipped": self._skipped}
        with atomic_write(self._path) as file:
            file.write_text(json.dumps(content, ensure_ascii=False))


class Table:
    """Table of a section; rows are added as they are obtained."""

    def __init__(self, section: Section, block: Block) -> None:
        self._section, self._block = section, block

    def add(self, *cells: object) -> None:
        """Add a row with one cell per column; None is shown as a dash."""
        assert len(cells) == len(self._block["columns"]), (cells, self._block["columns"])
        self._block["rows"].append(["–" if cell is None else str(cell) for cell in cells])
        self._section._write()


def read(path: Path) -> dict[str, Any]:
    """Read what a part has written so far; empty if it has written nothing."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"blocks": [], "records": [], "skipped": None}
    return content
