"""The shape of the repository: the import direction, and nothing that this project does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("snapgen", "spaces", "archsearch", "studies", "reports")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_imports_run_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_way_import_is_caught(tmp_path: Path) -> None:
    """The contract itself works: the same configuration over a tree with one import backwards fails."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "archsearch" / "cli").mkdir()
    (tmp_path / "archsearch" / "cli" / "__init__.py").write_text("from archsearch.cli import studying\n")
    (tmp_path / "archsearch" / "cli" / "studying.py").write_text("import reports\n")
    (tmp_path / "snapgen" / "arch.py").write_text("import studies\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "snapgen is not allowed to import studies" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_small_and_in_their_place(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert "torchvision" not in [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
