"""Results of the check: one Markdown file, and raw results as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import Part
from benchmarks.gpu_check.runner import Ending
from snapgen.io.atomic import atomic_write

MARKDOWN, RAW = "gpu-check.md", "gpu-check.json"


@dataclass
class Page:
    """Results so far; `write` replaces both files atomically.

    Attributes:
        out: folder of the results.
        about: description of the machine, by name.
        command: command line that ran the check.
        parts: the parts that were requested.
        sections: contents of each part's section, by the name of the part.
        endings: how each part ended, by its name; a part without an ending is running or waiting.
    """

    out: Path
    about: Mapping[str, str]
    command: str
    parts: Sequence[Part]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)

    def write(self) -> None:
        """Write the Markdown and the JSON file."""
        raw = {
            "command": self.command,
            "about": dict(self.about),
            "parts": {
                part.name: {
                    **({} if part.name not in self.endings else self.endings[part.name]._asdict()),
                    "records": self.sections.get(part.name, {}).get("records", []),
                }
                for part in self.parts
            },
        }
        for name, text in ((MARKDOWN, self.markdown()), (RAW, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")):
            with atomic_write(self.out / name) as file:
                file.write_text(text)

    def markdown(self) -> str:
        """Format the results as Markdown."""
        lines = ["# GPU check", "", f"Command: `{self.command}`", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        lines += ["", "| part | | seconds |", "|---|---|---|"]
        for part in self.parts:
            state, reason, seconds = self._ending(part)
            status = f"{state}: {reason}" if reason else state
            lines.append(f"| {part.title} | {cell(status)} | {'–' if seconds is None else f'{seconds:.0f}'} |")
        for number, part in enumerate(self.parts, 1):
            lines += ["", f"## {number}. {part.title}", "", *self._section(part)]
        return "\n".join(lines) + "\n"

    def _ending(self, part: Part) -> tuple[str, str, float | None]:
        if part.name in self.endings:
            return self.endings[part.name]
        return ("still running" if part.name in self.sections else "not begun", "", None)

    def _section(self, part: Part) -> list[str]:
        state, reason, _ = self._ending(part)
        lines = [] if state == "done" else [f"**{state[0].upper()}{state[1:]}**{': ' + reason if reason else '.'}", ""]
        for block in self.sections.get(part.name, {}).get("blocks", []):
            lines += [block["text"], ""] if "text" in block else _table(block)
        return lines[:-1] if lines and not lines[-1] else lines


def _table(block: Mapping[str, Any]) -> list[str]:
    if not block["rows"]:
        return []
    head = [f"| {' | '.join(map(cell, block['columns']))} |", "|" + "---|" * len(block["columns"])]
    return [f"**{block['title']}**", "", *head, *(f"| {' | '.join(map(cell, row))} |" for row in block["rows"]), ""]


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
