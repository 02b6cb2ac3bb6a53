"""What is missing is found, named and given a remedy; what is here is ready."""

from __future__ import annotations

import importlib.metadata
import shutil

import pytest

from archsearch import installation
from archsearch.installation import Check, inspect_installation
from tests.archsearch import apple_standin


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def without(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let packages be missing, or of another version."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            return real(name)
        found = versions[key]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_whole_installation_is_complete_and_every_command_ready() -> None:
    found = inspect_installation()
    assert found.complete
    assert {"archsearch", "torch", "optuna", "pydantic"} <= named(found.packages).keys()
    assert named(found.extras).keys() == set(installation.EXTRAS)
    assert all(check.ok and check.detail.startswith("ready") for check in found.commands)
    assert named(found.torch_devices)["cpu"].ok
    backends = named(found.latency_backends)
    assert backends["host"].ok
    assert "predicted:iphone-15-pro" in backends["predicted"].detail


def test_a_missing_package_is_missed_by_the_commands_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, fvcore=None, torch="2.9.1+cpu")
    found = inspect_installation()
    assert not found.complete
    assert named(found.packages)["fvcore"].detail == "is not installed"
    assert named(found.packages)["fvcore"].remedy.startswith("pip install 'fvcore>=")
    assert named(found.packages)["torch"].detail == "is 2.9.1+cpu, not >=2.13"
    assert not named(found.latency_backends)["host"].ok
    commands = named(found.commands)
    assert not commands["cost"].ok
    assert "fvcore is not installed" in commands["cost"].detail
    assert commands["best"].ok
    assert commands["schema"].ok


def test_a_missing_extra_is_told_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, psycopg=None)
    found = inspect_installation()
    assert found.complete, "an extra is optional"
    assert named(found.extras)["postgresql"].remedy == "pip install 'archsearch[postgresql]'"
    search = named(found.commands)["search"]
    assert search.ok
    assert "without storages of PostgreSQL" in search.detail
    assert "pip install 'archsearch[postgresql]'" in search.remedy


def test_without_its_own_metadata_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, archsearch=None)
    found = inspect_installation()
    assert not found.complete
    assert [check.name for check in found.packages] == ["archsearch"]


def test_tools_are_found_or_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/chrome" if name == "google-chrome" else None)
    tools = named(inspect_installation().tools)
    assert tools.keys() == installation.TOOLS.keys()
    assert tools["chromium"] == Check("chromium", True, "/bin/chrome")
    assert not tools["xcodebuild"].ok
    assert "Xcode" in tools["xcodebuild"].remedy


def test_a_mac_with_a_phone_measures_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    apple_standin.on_a_mac(monkeypatch)
    apple_standin.with_a_phone(monkeypatch)
    monkeypatch.setenv("ARCHSEARCH_SIGNING_TEAM", "TEAM")
    backends = named(inspect_installation().latency_backends)
    assert backends["coreml"].ok
    assert backends["iphone"] == Check("iphone", True, "Desk phone")
    monkeypatch.delenv("ARCHSEARCH_SIGNING_TEAM")
    assert "signing team" in named(inspect_installation().latency_backends)["iphone"].detail


@pytest.mark.parametrize(
    ("found", "condition", "meets"),
    [
        ("2.13.0+cpu", ">=2.13", True),
        ("2.9", ">=2.13", False),
        ("0.1.5.post20221221", ">=0.1.5.post20221221", True),
        ("0.1.0", "==0.1.0", True),
        ("0.1.1", "==0.1.0", False),
        ("3", "", True),
    ],
)
def test_versions_compare_as_numbers(found: str, condition: str, meets: bool) -> None:
    assert installation._meets(found, condition) is meets
