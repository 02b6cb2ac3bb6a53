"""Part 1: the tests that are marked ``gpu``, run by pytest.

Without CUDA they cannot run; then the tests of one file that also run on the CPU stand in for them.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from benchmarks.gpu_check.section import Section
from benchmarks.gpu_check.setup import Setup

ROOT = Path(__file__).resolve().parents[2]
STANDS_IN = "tests/snapgen/test_on_cuda.py"
"""A file of such tests, of which each also runs on the CPU."""
MARK = "mark." + "gpu"
SHOWN = 200
"""Characters of a failure's message."""


def run(section: Section, setup: Setup) -> None:
    """The tests, each with its outcome; a failure is shown and does not end the check."""
    report = setup.folder / "tests.xml"
    chosen = ["-m", "gpu", *marked()] if setup.device == "cuda" else ["-m", "not gpu", STANDS_IN]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
    if setup.device != "cuda":
        section.say(f"No CUDA: the tests of `{STANDS_IN}` that run on the CPU stand in for those that need it.")
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.is_file():
        section.say(f"pytest ended with status {done.returncode} and left no report; see log.txt.")
        raise RuntimeError("pytest left no report")
    table = section.table("Tests", ["test", "outcome", "seconds", "message"])
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, message = _outcome(case)
        found[outcome] += 1
        place = case.get("classname", "").removeprefix("tests.")
        table.add(f"{place}: {case.get('name')}", outcome, case.get("time"), message[:SHOWN] or None)
        section.record(what="test", test=f"{place}.{case.get('name')}", outcome=outcome, message=message)
    section.say(", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())) + ".")
    lost = found["failed"] + found["error"]
    if lost:
        raise RuntimeError(f"{lost} of {found.total()} tests failed")


def marked() -> list[str]:
    """The files with such tests: others may import what is not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARK in path.read_text()]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, outcome in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        element = case.find(kind)
        if element is not None:
            return outcome, " ".join((element.get("message") or element.text or "").split())
    return "passed", ""
