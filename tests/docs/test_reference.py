"""The reference has every setting, as the settings' types have it now."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

from snapgen.config import Config
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """docs/reference.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_what_the_types_say() -> None:
    command = [sys.executable, "docs/reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_no_setting_is_left_out(reference: ModuleType) -> None:
    models = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = page.read_text()
        for _, _, name, *_ in reference.SECTION.findall(text):
            models.add(name.rpartition(":")[2])
            for field in pkgutil.resolve_name(name).model_fields:
                assert f"| `{field}` |" in text, f"{name}.{field} is not in {page.name}"
    assert models >= {"StudyConfig", "Recipe", "ComparisonConfig", "SpaceConfig", "EvaluationProtocol", "Architecture"}


def test_a_default_that_depends_is_said_to() -> None:
    rows = (ROOT / "docs" / "reference" / "study.md").read_text().splitlines()
    for start in ("| `sampler` |", "| `name` | Expected hypervolume"):
        (row,) = (row for row in rows if row.startswith(start))
        assert row.endswith("| ehvi or gp, by the objectives |")


class Described(Config):
    """Settings of this test."""

    steps: int = 3
    """Steps to take; None of them is free."""
    bare: int = 4


def test_a_setting_without_a_description_is_refused(reference: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"Described\.bare has no description; write a string literal under it"):
        reference.render("<!-- tests.docs.test_reference:Described -->\n\n", {})


def test_descriptions_are_for_readers_of_yaml(reference: ModuleType) -> None:
    assert reference.descriptions(Described)["steps"] == "Steps to take; `null` of them is free."
    assert (
        reference.for_tables("as num_samples of protocol.train_seeds") == "as `num_samples` of `protocol.train_seeds`"
    )
