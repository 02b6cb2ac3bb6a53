"""The site builds without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


def test_it_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="needs the extra docs")
    command = [sys.executable, "docs/build.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "docs/index.html", "docs/reference/study/index.html", "reports/results/index.html"):
        assert (tmp_path / "site" / page).exists()
