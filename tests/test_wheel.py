"""The wheel holds all that a search needs, and works where the sources are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from archsearch.library import Kind, SchemaKind, schema_path

ROOT = Path(__file__).parent.parent
STUDY = {
    "name": "tiny",
    "space": "emoji",
    "trials": 2,
    "protocol": {"steps": 3, "num_samples": 8, "validation_pairs": 8, "num_inference_steps": 2, "train_seeds": [0]},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, built from a copy so that the checkout stays clean."""
    source, out, site = (tmp_path_factory.mktemp(name) for name in ("source", "out", "site"))
    for folder in ("archsearch", "snapgen", "spaces", "studies"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
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


def test_the_wheel_has_two_packages_and_all_that_is_shipped(site: Path) -> None:
    folders = {path.name for path in site.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert folders - {"bin"} == {"archsearch", "snapgen"}
    code = f"from archsearch.library import shipped; print(sorted((k, *shipped(k)) for k in {get_args(Kind)}))"
    installed = run([sys.executable, "-c", code], cwd=site.parent, PYTHONPATH=str(site))
    checkout = run([sys.executable, "-c", code], cwd=site.parent, PYTHONPATH=str(ROOT))
    assert installed == checkout
    assert "snapgen_t2i" in installed
    for kind in get_args(SchemaKind):
        assert (site / schema_path(kind).relative_to(ROOT)).is_file()


def test_a_checkout_without_links_finds_what_is_shipped(tmp_path: Path) -> None:
    """As git makes one where symbolic links are not to be had: the links are files with a path in them."""
    shutil.copytree(ROOT / "archsearch" / "library", tmp_path / "archsearch" / "library", symlinks=True)
    (tmp_path / "archsearch" / "__init__.py").touch()
    for name in ("spaces", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name)
        (tmp_path / "archsearch" / "library" / name).unlink()
        (tmp_path / "archsearch" / "library" / name).write_text(f"../../{name}")
    code = "from archsearch.library import shipped; print(shipped('space')['emoji'], shipped('training')['emoji'])"
    said = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert said.split() == [
        str(tmp_path / "spaces" / "emoji.yaml"),
        str(tmp_path / "studies" / "training" / "emoji.yaml"),
    ]


def test_it_shares_an_environment_with_a_package_called_spaces(site: Path, tmp_path: Path) -> None:
    """Hugging Face's own package has this name, and every demo on its Spaces imports it beside our pipeline."""
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "__init__.py").write_text("GPU = 'a decorator'")
    code = "import spaces, archsearch.library, snapgen; print(spaces.GPU, *archsearch.library.shipped('space'))"
    said = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=f"{site}{os.pathsep}{tmp_path}")
    assert "a decorator" in said
    assert "emoji" in said


def test_the_wheel_carries_data_and_licences(site: Path) -> None:
    assert sorted(path.name for path in (site / "snapgen" / "data" / "emoji").glob("LICENSE*"))
    tables = Path("archsearch", "studies", "tabular", "tables")
    assert {path.name for path in (site / tables).iterdir()} == {path.name for path in (ROOT / tables).iterdir()}
    (info,) = site.glob("archsearch-*.dist-info")
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "archsearch = archsearch.cli:main" in (info / "entry_points.txt").read_text()
