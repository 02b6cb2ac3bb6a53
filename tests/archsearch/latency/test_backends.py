"""Contract of every backend, which studies, device servers and reports rely on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from archsearch import devices
from archsearch.latency.base import Backend
from archsearch.latency.steady_state import SteadyStateConfig
from archsearch.score import LatencyRecord
from archsearch.studies.config.study import LatencyConfig
from snapgen.errors import InputError
from tests.archsearch import apple_standin, coreai_standin
from tests.snapgen.nets import tiny

SMALL = tiny()
LARGE = tiny({"levels[1].channels": 128})
LATENT, TOKENS = 8, 3
BRIEF: Mapping[str, Any] = {"rule": SteadyStateConfig(block_seconds=0.002, seconds=0.5).model_dump()}

TIMED = ("host", "predicted:iphone-15-pro")
"""Whose times are of the net itself."""
STOOD_IN = ("coreml", "coreai", "iphone")
REAL = tuple(pytest.param(f"real {name}", marks=pytest.mark.mac) for name in STOOD_IN)


@pytest.fixture(params=(*TIMED, *STOOD_IN, *REAL))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of a device that can be used here."""
    name: str = request.param
    if name.startswith("real "):
        name = name.removeprefix("real ")
        if platform.system() != "Darwin":
            pytest.skip(f"{name} needs a Mac")
        try:
            devices.backend(name)
        except InputError as error:
            pytest.skip(str(error))
    elif name in STOOD_IN:
        apple_standin.no_conversion(monkeypatch, tmp_path)
        apple_standin.on_a_mac(monkeypatch)
        apple_standin.with_a_phone(monkeypatch)
        coreai_standin.with_core_ai(monkeypatch)
    return name


@pytest.fixture
def backend(device: str) -> Backend:
    return devices.backend(device, **({} if device.startswith("predicted:") else BRIEF))


Records = tuple[LatencyRecord, LatencyRecord]
_MEASURED: dict[str, Records] = {}


@pytest.fixture
def records(request: pytest.FixtureRequest, backend: Backend) -> Records:
    """Records of a small and a larger net, measured once for all tests."""
    name = request.node.callspec.params["device"]
    if name not in _MEASURED:
        _MEASURED[name] = (backend.measure(SMALL, LATENT, TOKENS), backend.measure(LARGE, LATENT, TOKENS))
    return _MEASURED[name]


def test_a_record_is_whole(device: str, records: Records) -> None:
    for record in records:
        assert 0 < record.lower_quartile_ms <= record.median_ms <= record.upper_quartile_ms
        assert record.device == device.removeprefix("predicted:")
        assert all((record.chip, record.os, record.compute_units, record.runtime))
        assert record.load_ms >= 0


def test_the_record_names_its_source(device: str, records: Records) -> None:
    for record in records:
        if device.startswith("predicted:"):
            assert (record.source, record.runs) == ("predicted", 0)
            assert record.interval_ms is not None
            assert record.interval_ms[0] < record.median_ms < record.interval_ms[1]
        else:
            assert record.source == "measured"
            assert record.runs >= 3
            assert record.interval_ms is None


def test_a_record_survives_its_storage(records: Records) -> None:
    for record in records:
        assert LatencyRecord.model_validate_json(record.model_dump_json()) == record


def test_the_record_names_its_runtime(device: str, records: Records) -> None:
    engines = {"host": "ONNX Runtime", "coreai": "Core AI"}
    for record in records:
        assert record.engine == engines.get(device, "Core ML")


def test_candidates_share_their_conditions(records: Records) -> None:
    small, large = records
    assert small.conditions == large.conditions


@pytest.mark.parametrize("device", TIMED, indirect=True)
def test_a_larger_net_is_slower(records: Records) -> None:
    small, large = records
    assert small.median_ms < large.median_ms


@pytest.mark.parametrize("size", [0, -2, 7])
def test_a_latent_of_the_wrong_size_is_the_users_mistake(size: int, backend: Backend) -> None:
    with pytest.raises(InputError, match="use a multiple of 2"):
        backend.measure(SMALL, size, TOKENS)


def test_a_study_that_names_only_the_device_can_use_it(device: str) -> None:
    devices.backend(device, **LatencyConfig(device=device).backend_options)


def test_an_unknown_option_is_the_users_mistake(device: str) -> None:
    with pytest.raises(InputError, match="unknown key"):
        devices.backend(device, colour="red")
