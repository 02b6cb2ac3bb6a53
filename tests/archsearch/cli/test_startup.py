"""Help, completion and a bare import answer at once: nothing heavy is loaded for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = {
    *("torch", "optuna", "diffusers", "transformers", "pandas", "plotly", "numpy", "scipy", "coremltools", "PIL"),
    *("onnx", "onnxruntime", "accelerate", "sqlalchemy", "tensorboard", "fvcore"),
}
IMPORT = "import archsearch, snapgen"
RUN = """
import sys
sys.argv = ["archsearch", *sys.argv[1:]]
from archsearch import cli
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code
"""
PRINT = "\nprint('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded(code: str, *arguments: str, **env: str) -> set[str]:
    """The top-level packages in a new process after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{PRINT}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_to_import_both_packages_loads_nothing_heavy() -> None:
    packages = loaded(IMPORT)
    assert {"archsearch", "snapgen"} <= packages
    assert not packages & HEAVY


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("search", "--help"), ("latency", "blocks", "-h")])
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    packages = loaded(RUN, *arguments)
    assert "archsearch" in packages
    assert not packages & HEAVY


def test_the_list_of_commands_loads_no_settings() -> None:
    assert "pydantic" not in loaded(RUN, "--help"), "typer itself needs it for a command's own options"


def test_completion_loads_nothing_heavy() -> None:
    env = {"_ARCHSEARCH_COMPLETE": "complete_bash", "COMP_WORDS": "archsearch latency ", "COMP_CWORD": "2"}
    assert not loaded(RUN, **env) & HEAVY


def test_schemas_are_printed_without_the_types_that_they_are_of() -> None:
    assert not loaded(RUN, "schema", "study") & HEAVY
