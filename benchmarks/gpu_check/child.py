"""Process of one part: ``python -m benchmarks.gpu_check.child NAME SECTION SETUP``.

The part writes its results to the JSON file SECTION; its output goes to the log. If a package or an input is missing,
the section says so and the part counts as skipped, not as failed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.section import Section
from benchmarks.gpu_check.setup import Setup

Run = Callable[[Section, Setup], None]


def run_of(name: str) -> Run:
    """The function of a part; its module is imported only here, because any of its packages may be missing."""
    run: Run = importlib.import_module(f"benchmarks.gpu_check.{name}").run
    return run


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages whose modules, which have the same names, cannot be found."""
    return [package for package in packages if importlib.util.find_spec(package.replace("-", "_")) is None]


def main(name: str, path: Path, setup: Setup) -> None:
    """Run a part, or mark it as skipped in its section if something that it needs is missing."""
    section = Section(path)
    (part,) = (part for part in PARTS if part.name == name)
    packages = missing(part.needs)
    if packages:
        section.skip(f"not installed: {', '.join(packages)}")
        return
    from snapgen.errors import InputError

    try:
        run_of(name)(section, setup)
    except (InputError, ModuleNotFoundError) as error:
        section.skip(" ".join(str(error).split()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    setup = Setup.from_json(sys.argv[3])
    setup.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(setup.folder)  # run folders are created in the current directory
    main(sys.argv[1], Path(sys.argv[2]), setup)
