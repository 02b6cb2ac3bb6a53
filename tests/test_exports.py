"""What packages offer lazily: the names, where they come from, and that nothing heavy is imported for it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAZY = sorted(
    path
    for package in ("snapgen", "archsearch")
    for path in (ROOT / package).rglob("__init__.py")
    if "lazy_exports(" in path.read_text()
)
HEAVY = ("torch", "optuna", "pandas", "diffusers", "transformers", "plotly")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def name_of(path: Path) -> str:
    return ".".join(path.parent.relative_to(ROOT).parts)


@pytest.mark.parametrize("path", LAZY, ids=name_of)
def test_a_package_offers_what_type_checkers_see(path: Path) -> None:
    tree = ast.parse(path.read_text())
    seen = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "snapgen.lazy")
        for alias in node.names
    }
    package = importlib.import_module(name_of(path))
    assert package.__all__ == sorted(name for _, name in seen)
    assert package.__doc__
    assert set(package.__all__) <= set(dir(package))
    for module, name in seen:
        assert module is not None
        assert getattr(package, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", LAZY, ids=name_of)
def test_no_offered_name_is_a_module_of_the_package(path: Path) -> None:
    """Whoever imported the module would set it in the name's place."""
    modules = {file.stem for file in path.parent.glob("*.py")} | {
        file.parent.name for file in path.parent.glob("*/__init__.py")
    }
    assert not modules & set(importlib.import_module(name_of(path)).__all__)


def test_unknown_names_are_no_attributes() -> None:
    import archsearch

    with pytest.raises(AttributeError, match="module 'archsearch' has no attribute 'serach'"):
        archsearch.serach  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'serach'"):
        from archsearch import serach  # noqa: F401


def test_packages_import_nothing_heavy() -> None:
    packages = ", ".join(name_of(path) for path in LAZY)
    assert run(f"import sys, {packages}\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]"


ORDERS = {
    "functions first": "from archsearch import count_cost, measure_latency, search, train\n"
    "import archsearch.cost.counter, archsearch.latency.host, archsearch.training.run, archsearch.studies.search.run",
    "modules first": "import archsearch.cost.counter, archsearch.latency.host, archsearch.training.run\n"
    "import archsearch.studies.search.run\n"
    "from archsearch import count_cost, measure_latency, search, train",
}


@pytest.mark.parametrize("lines", ORDERS.values(), ids=ORDERS)
def test_functions_are_functions_whatever_was_imported_before(lines: str) -> None:
    program = f"{lines}\nimport archsearch\nprint(archsearch.count_cost is count_cost, *map(callable, (count_cost, "
    assert run(f"{program}measure_latency, search, train)))") == "True True True True True"
