"""The command line as a whole: its commands in the order of their use, each with an example."""

from __future__ import annotations

import errno
import re
import sys
from typing import Any

import pytest
import typer

from archsearch import cli, installation

GROUP: Any = typer.main.get_command(cli.app)


def test_help_lists_every_command_in_the_order_of_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["archsearch", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    listed = re.findall(r"^  ([a-z][a-z-]*)  ", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE)
    assert listed == [*installation.COMMANDS]
    assert set(GROUP.commands) == set(installation.COMMANDS)


@pytest.mark.parametrize("name", installation.COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    command = GROUP.commands[name]
    for path, leaf in [(name, command)] + [
        (f"{name} {sub}", each) for sub, each in getattr(command, "commands", {}).items()
    ]:
        if hasattr(leaf, "commands"):
            continue
        example = leaf.epilog.removeprefix("Example: ").partition("    ")[0]
        assert example.startswith(f"archsearch {path} "), leaf.epilog
        options = {option for parameter in leaf.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z0-9-]+", example)) <= options


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory ("),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: …\nmore"), "out of memory ("),
        (
            OSError(errno.EMFILE, "Too many open files", "sdxl.yaml"),
            "sdxl.yaml: too many open files; close other programs",
        ),
    ],
)
def test_a_fault_of_the_machine_is_one_line(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("snapgen.architecture.presets.resolve", full)
    monkeypatch.setattr(sys, "argv", ["archsearch", "cost", "sdxl"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"archsearch: {told}")


def test_an_interrupt_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snapgen.architecture.presets.resolve", interrupted)
    monkeypatch.setattr(sys, "argv", ["archsearch", "cost", "snapgen-emoji"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert (
        capsys.readouterr().err.strip()
        == "archsearch: interrupted; run the same command again: studies and trainings resume"
    )
