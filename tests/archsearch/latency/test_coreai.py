"""Core AI's backend, on a Mac that is a stand-in."""

from __future__ import annotations

import importlib
import inspect
import time
from pathlib import Path
from typing import Any

import pytest

from archsearch import devices
from archsearch.latency import iphone
from archsearch.latency.base import MeasurementError
from archsearch.score import LatencyRecord
from snapgen.errors import InputError
from tests.archsearch import apple_standin, coreai_standin
from tests.archsearch.coreai_standin import CoreAI
from tests.snapgen.nets import tiny

ARCH, LATENT, TOKENS = tiny(), 4, 3
BRIEF = {"block_seconds": 0.002, "seconds": 0.5}


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CoreAI:
    apple_standin.no_conversion(monkeypatch, tmp_path)
    return coreai_standin.with_core_ai(monkeypatch)


def measured(**options: Any) -> LatencyRecord:
    return devices.backend("coreai", rule=BRIEF, **options).measure(ARCH, LATENT, TOKENS)


def test_a_call_is_timed_on_the_preferred_unit(core: CoreAI) -> None:
    core.call = lambda: time.sleep(0.01)
    record = measured(compute_units="gpu")
    assert 10 <= record.median_ms < 15
    assert (record.engine, record.compute_units, record.placement) == ("Core AI", "gpu", None)
    assert record.runtime == "Core AI, coreai-core 1"
    assert core.asked[0] == ("net.mlpackage", "prefers gpu")
    assert core.asked[1].keys() == {"sample", "time_features", "context"}
    assert core.asked[1]["sample"] == (1, ARCH.latent_channels, LATENT, LATENT)


def test_weights_of_fewer_bits_are_told_in_the_record(core: CoreAI) -> None:  # noqa: ARG001
    assert measured(weights={"palette_bits": 4}).runtime.endswith(", 4-bit weights")


def test_a_net_that_takes_too_long_or_yields_nan_is_no_measurement(core: CoreAI) -> None:
    core.value = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        measured()
    core.value, core.call = 0.5, lambda: time.sleep(0.3)
    with pytest.raises(MeasurementError, match=r"timed out after 0\.1 s"):
        measured(timeout=0.1)


def test_a_mac_without_core_ai_is_told(core: CoreAI, monkeypatch: pytest.MonkeyPatch) -> None:
    core.supported = False
    with pytest.raises(InputError, match="set USE_OS_COREAI=1"):
        devices.backend("coreai")
    monkeypatch.setattr(iphone.platform, "mac_ver", lambda: ("26.4", ("", "", ""), "arm64"))
    with pytest.raises(InputError, match="coreai needs macOS 27, but this is 26"):
        devices.backend("coreai")
    monkeypatch.setattr(iphone.platform, "system", lambda: "Linux")
    with pytest.raises(InputError, match="coreai needs a Mac"):
        devices.backend("coreai")


def test_the_stand_in_has_the_runtimes_own_signatures() -> None:
    pytest.importorskip("coreai.runtime", reason="the extra coreai is not installed")
    real, stand_in = importlib.import_module("coreai.runtime"), coreai_standin.runtime(CoreAI())
    for path in (
        "AIModel.load",
        "AIModel.load_function",
        "InferenceFunction.__call__",
        "SpecializationOptions.from_preferred_compute_unit_kind",
    ):
        kind, name = path.split(".")
        ours, theirs = (getattr(getattr(module, kind), name) for module in (stand_in, real))
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), path
        assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs), path
    assert callable(real.NDArray.numpy)
    assert callable(real.SpecializationOptions.is_supported)
