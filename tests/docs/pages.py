"""The Markdown files that people read, and what they say in code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "reports", "spaces", "snapgen")
PAGES = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
"""Every Markdown file of the repository."""
SETTINGS = sorted(path for name in ("spaces", "studies") for path in (ROOT / name).rglob("*.yaml"))
"""The YAML files whose comments give commands."""


@dataclass(frozen=True)
class Block:
    """A block of code: its language, empty where none is said, its first line's number and its text."""

    language: str
    line: int
    text: str


def name(path: Path) -> str:
    """A file as tests show it."""
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[Block]:
    """The fenced and the indented blocks of a page; a list's continued lines are indented blocks only after a blank."""
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        fence = re.match(r"(```+)(\w*)", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(fence[1]))
            yield Block(fence[2], i + 2, "\n".join(lines[i + 1 : end]))
            i = end
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = next((j for j in range(i, len(lines)) if lines[j] and not lines[j].startswith("    ")), len(lines))
            yield Block("", i + 1, "\n".join(line.strip() for line in lines[i:end]))
            i = end - 1
        i += 1


def prose(text: str) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^(```+).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
