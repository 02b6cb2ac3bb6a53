"""The process of one part: ``python -m benchmarks.gpu_check.child NAME SECTION SETUP``.

What the part says goes to the JSON file SECTION; what it prints is kept in the log. A package that is missing, or
something that cannot be had, is said in the section and is no failure.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.section import Section
from benchmarks.gpu_check.setup import Setup

Run = Callable[[Section, Setup], None]


def run_of(name: str) -> Run:
    """The function of a part, whose imports are made only now: any may be missing."""
    if name == "tests":
        from benchmarks.gpu_check import suite

        return suite.run
    if name == "steps":
        from benchmarks.gpu_check import steps

        return steps.run
    if name == "ladder":
        from benchmarks.gpu_check import ladder

        return ladder.run
    if name == "search":
        from benchmarks.gpu_check import searching

        return searching.run
    if name == "emoji":
        from benchmarks.gpu_check import distilling

        return distilling.run
    assert name == "teacher", name
    from benchmarks.gpu_check import teaching

    return teaching.run


def missing(needs: dict[str, str]) -> list[str]:
    """The packages to install for those modules that are not there."""
    return [package for module, package in needs.items() if importlib.util.find_spec(module) is None]


def main(name: str, path: Path, setup: Setup) -> None:
    """Run a part, and say in its section if it cannot be had."""
    section = Section(path)
    (part,) = (part for part in PARTS if part.name == name)
    lacking = missing(part.needs)
    if lacking:
        section.skip(f"not installed: {', '.join(lacking)}")
        return
    from snapgen.errors import InputError

    try:
        run_of(name)(section, setup)
    except (InputError, ModuleNotFoundError) as error:
        section.skip(" ".join(str(error).split()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    given = Setup.from_json(sys.argv[3])
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)  # runs are folders under the current one
    main(sys.argv[1], Path(sys.argv[2]), given)
