"""The shape of the repository: the import direction, and nothing that this project does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("snapgen", "archsearch")
ROOMS = sorted(path.parent.name for path in (ROOT / "archsearch").glob("*/__init__.py"))
MODULES = sorted(path.stem for path in (ROOT / "archsearch").glob("*.py") if path.stem != "__init__")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_imports_run_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = {
    "a package imports the one above it": (
        "snapgen/errors.py",
        "import archsearch.spaces",
        "snapgen is not allowed to",
    ),
    "a room imports the one above it": (
        "archsearch/studies/x.py",
        "import archsearch.reports",
        "archsearch.studies is not",
    ),
    "two modules import each other": ("snapgen/errors.py", "import snapgen.files", "No cycles are allowed in snapgen"),
    "two rooms import each other": ("snapgen/io/x.py", "import snapgen.data.y", "No cycles are allowed in snapgen"),
}


@pytest.mark.parametrize(("path", "line", "said"), WRONG.values(), ids=WRONG)
def test_wrong_imports_are_caught(tmp_path: Path, path: str, line: str, said: str) -> None:
    """The contracts themselves work: the same configuration over a tree with one import too many fails."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for folder in ("snapgen", "snapgen/io", "snapgen/data", *(f"archsearch/{room}" for room in ROOMS)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    for module, text in {
        "archsearch/__init__.py": "",
        **{f"archsearch/{name}.py": "" for name in MODULES},
        "snapgen/files.py": "import snapgen.errors",
        "snapgen/data/y.py": "import snapgen.io.x",
        path: line,
    }.items():
        (tmp_path / module).write_text(text)
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert said in done.stdout


@pytest.mark.parametrize("room", sorted({path.parent for path in SOURCES}), ids=str)
def test_rooms_hold_at_most_twelve_modules(room: Path) -> None:
    assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 12


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_small_and_in_their_place(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert "torchvision" not in [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
