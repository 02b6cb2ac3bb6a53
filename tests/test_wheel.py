"""The wheel holds all that a search needs, and works where the sources are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STUDY = {
    "name": "tiny",
    "space": "emoji",
    "trials": 2,
    "protocol": {"steps": 3, "samples": 8, "validation_pairs": 8, "sampler_steps": 2, "seeds": [0]},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, built from a copy so that the checkout stays clean."""
    source, out, site = (tmp_path_factory.mktemp(name) for name in ("source", "out", "site"))
    for package in ("archsearch", "snapgen", "spaces", "studies", "reports"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], cwd=source)
    (wheel,) = out.glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)], cwd=out)
    return site


def run(command: list[str], *, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_wheel_searches(site: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    where = run([sys.executable, "-c", "import snapgen; print(snapgen.__file__)"], cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    command = [sys.executable, "-m", "archsearch", "search", "study.yaml", "--quiet"]
    said = run(command, cwd=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    report = tmp_path / "runs" / "tiny" / "report.html"
    assert str(report) in said
    assert report.stat().st_size > 1_000_000, "plotly is in the page"
    assert len((report.with_suffix(".csv")).read_text().splitlines()) >= 3


def test_the_wheel_carries_data_and_licences(site: Path) -> None:
    assert sorted(path.name for path in (site / "snapgen" / "emoji").glob("LICENSE*"))
    (info,) = site.glob("archsearch-*.dist-info")
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "archsearch = archsearch.cli:main" in (info / "entry_points.txt").read_text()
