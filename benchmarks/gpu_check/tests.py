"""Part 1: the tests marked ``gpu``.

Without CUDA, the tests of one file that also run on the CPU are run instead.
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
CPU_TESTS = "tests/snapgen/test_on_cuda.py"
"""File whose tests run on CUDA and on the CPU."""
MARK = "mark." + "gpu"
MAX_MESSAGE = 200
"""Maximum number of characters of a failure's message."""


def run(section: Section, setup: Setup) -> None:
    """Run the tests and show the outcome of each; a failure does not end the check."""
    report = setup.folder / "tests.xml"
    chosen = ["-m", "gpu", *marked()] if setup.device == "cuda" else ["-m", "not gpu", CPU_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
    if setup.device != "cuda":
        section.say(f"No CUDA: only the tests in `{CPU_TESTS}` that run on the CPU are run.")
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.is_file():
        section.say(f"pytest ended with status {done.returncode} and left no report; see log.txt.")
        raise RuntimeError("pytest left no report")
    table = section.table("Tests", ["test", "outcome", "seconds", "message"])
    outcomes: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, message = _outcome(case)
        outcomes[outcome] += 1
        module = case.get("classname", "").removeprefix("tests.")
        table.add(f"{module}: {case.get('name')}", outcome, case.get("time"), message[:MAX_MESSAGE] or None)
        section.record(what="test", test=f"{module}.{case.get('name')}", outcome=outcome, message=message)
    section.say(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) + ".")
    failed = outcomes["failed"] + outcomes["error"]
    if failed:
        raise RuntimeError(f"{failed} of {outcomes.total()} tests failed")


def marked() -> list[str]:
    """Test files that use the mark ``gpu``; others are not collected because their imports may be missing."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARK in path.read_text()]


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, outcome in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        element = case.find(kind)
        if element is not None:
            return outcome, " ".join((element.get("message") or element.text or "").split())
    return "passed", ""
