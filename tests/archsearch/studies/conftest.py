from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.archsearch.studies import quick


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a database of this test run's own."""
    from tests.archsearch.studies.postgresql import or_skipped

    with or_skipped() as server:
        yield server.url


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseProcess]:
    """Start a function in a fresh process, which has the heavy imports behind it already."""
    # The server that forks finds our modules only by this, and says nothing when it does not.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.archsearch.studies.warm", "tests.archsearch.studies.tiny_recipe"])

    def begin(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return begin


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """Settings of the quick study, with changes."""
    return lambda **changes: quick.settings(tmp_path, **changes)


@pytest.fixture
def space(tmp_path: Path) -> str:
    """File of the small space."""
    path = tmp_path / "small.yaml"
    path.write_text(quick.SMALL_SPACE)
    return str(path)
