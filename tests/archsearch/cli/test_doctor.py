"""The command doctor prints every check, and its status says whether a required package is missing."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import pytest
import typer

from archsearch import cli, installation
from archsearch.installation import Check, Installation


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The status of a command, and what it printed."""

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["archsearch", *arguments])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    return run


def found(*, complete: bool) -> Installation:
    package = Check("torch", complete, "2.13.0" if complete else "is not installed", "" if complete else "pip install")
    return Installation((package,), (), (), (), (), (Check("search", complete, "ready"),))


def test_it_prints_every_check(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "inspect_installation", lambda: found(complete=True))
    status, out = run("doctor")
    assert status == 0
    words = "Required packages torch yes 2.13.0 Extras External tools Devices of torch Latency backends Commands"
    assert " ".join(out.split()) == f"{words} search yes ready"


def test_a_missing_required_package_is_status_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "inspect_installation", lambda: found(complete=False))
    status, out = run("doctor", "--json")
    assert status == 1
    assert json.loads(out)["complete"] is False
    assert json.loads(out)["packages"][0]["remedy"] == "pip install"


def test_every_command_is_checked() -> None:
    assert set(installation.COMMANDS) == set(typer.main.get_group(cli.app).commands)


def test_every_package_that_a_command_needs_is_required() -> None:
    required = {each.name for each in installation._requirements()}
    assert {name for packages, _ in installation.COMMANDS.values() for name in packages} <= required


def test_the_version_is_that_of_the_package(run: Any) -> None:
    status, out = run("--version")
    assert status == 0
    assert out.startswith(f"archsearch {importlib.metadata.version('archsearch')} (torch 2.")


def test_completion_names_the_commands(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COMP_WORDS": "archsearch se", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_ARCHSEARCH_COMPLETE", "complete_bash")
    assert run()[1].split() == ["search", "serve-device"]
