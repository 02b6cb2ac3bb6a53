"""The lines of docs/python.md, run one block after another as in a notebook."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.archsearch import tiny_studies

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the blocks share. Shipped studies and recipes are replaced by tiny ones of the same names."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_studies.ship(tmp_path_factory.mktemp("notebook"), patch)
        yield {}


def test_the_lines_of_the_page_run(notebook: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        for statement in ast.parse("".join(BLOCKS)).body:
            run(statement, notebook)


def run(statement: ast.stmt, names: dict[str, Any]) -> None:
    """A statement; what an expression gives is shown, as a notebook would."""
    if not isinstance(statement, ast.Expr):
        exec(compile(ast.Module([statement], []), str(PAGE), "exec"), names)
        return
    value = eval(compile(ast.Expression(statement.value), str(PAGE), "eval"), names)
    assert repr(value)
    if hasattr(value, "_repr_html_"):
        value._repr_html_()


def test_the_page_has_blocks_for_every_function() -> None:
    import archsearch

    functions = {name for name in archsearch.__all__ if name[0].islower()}
    assert functions <= set(re.findall(r"\w+", "".join(BLOCKS)))
