from __future__ import annotations

import json
import os
import platform

import pytest

from archsearch import machine


def test_the_description_is_json_and_names_the_libraries() -> None:
    info = machine.system_info()
    assert json.loads(json.dumps(info)) == info
    assert info["chip"] == machine.chip() != ""
    assert isinstance(info["cores"], int)
    assert 1 <= info["cores"] <= (os.cpu_count() or 1)
    assert isinstance(info["memory_gib"], float)
    assert info["memory_gib"] > 0.1
    assert isinstance(info["libraries"], dict)
    assert info["libraries"]["torch"] == machine.installed("torch")
    assert {"onnxruntime", "optuna"} <= set(info["libraries"])


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD  EPYC 9\nmodel\t\t: 3\n\nmodel name\t: another\n", "AMD EPYC 9"),
        ("processor : 0\nBogoMIPS : 108\n\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor : 0\nBogoMIPS : 108\n", ""),
        ("", ""),
    ],
)
def test_linux_names_the_first_processor(cpuinfo: str, name: str) -> None:
    assert machine.model_name(cpuinfo) == name


def test_a_machine_without_a_processor_name_still_has_a_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Plan 9")
    monkeypatch.setattr(platform, "processor", lambda: "")
    machine.chip.cache_clear()
    try:
        assert machine.chip() == platform.machine()
    finally:
        machine.chip.cache_clear()


def test_a_missing_package_has_no_version() -> None:
    assert machine.installed("no-such-package") is None
