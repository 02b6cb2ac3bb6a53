"""Build the documentation's site: copy the repository's Markdown files and what they show, then run Zensical, strictly.

    python docs/build.py           # into build/docs/site
    python docs/build.py FOLDER    # into FOLDER/site

The copy keeps the repository's folders, so that one relative link works in a checkout and on the site.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".md", ".css", ".png", ".csv", ".tex", ".yaml", ".json", ".jsonl", ".cff")
FOLDERS = ("docs", "reports/results", "snapgen/autoencoders/weights", "snapgen/data/emoji", "spaces", "studies")


def documents() -> Iterator[Path]:
    """Every file of the site, relative to the repository."""
    for folder in (ROOT, *(ROOT / name for name in FOLDERS)):
        paths = folder.iterdir() if folder == ROOT else folder.rglob("*")
        for path in sorted(paths):
            if path.is_file() and (path.suffix in SUFFIXES or path.name.startswith("LICENSE")):
                yield path.relative_to(ROOT)


def main() -> None:
    """Copy, then build."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    for old in ("source", "site"):
        shutil.rmtree(out / old, ignore_errors=True)
    for path in documents():
        copy = out / "source" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy)
    shutil.copyfile(ROOT / "docs" / "zensical.toml", out / "zensical.toml")
    program = Path(sys.executable).with_name("zensical")
    sys.exit(subprocess.run([program, "build", "--strict"], cwd=out).returncode)


if __name__ == "__main__":
    main()
