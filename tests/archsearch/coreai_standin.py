"""Core AI on a Mac that is not there, at the interface of ``coreai.runtime``."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from archsearch.latency import iphone


@dataclass
class CoreAI:
    """What the runtime does with a net, and what it was asked."""

    call: Callable[[], None] = lambda: None
    value: float = 0.5
    supported: bool = True
    asked: list[Any] = field(default_factory=list)


class NDArray:
    def __init__(self, data: Any) -> None:
        assert data.dtype == np.float16
        self.data = data

    def numpy(self) -> Any:
        return self.data


def runtime(core: CoreAI) -> ModuleType:
    """The module ``coreai.runtime``."""

    class Function:
        async def __call__(self, inputs: dict[str, NDArray] | None = None, state: Any = None) -> dict[str, NDArray]:
            assert inputs is not None
            assert state is None
            core.call()
            core.asked.append({name: array.data.shape for name, array in inputs.items()})
            return {"velocity": NDArray(np.full(inputs["sample"].data.shape, core.value, np.float16))}

    class AIModel:
        @classmethod
        async def load(cls, path: Path, specialization_options: Any = None) -> Any:
            core.asked.append((Path(path).name, specialization_options))
            return cls()

        def load_function(self, function_name: str, intermediate_logger: Any = None, profiler: Any = None) -> Any:
            assert (function_name, intermediate_logger, profiler) == ("main", None, None)
            return Function()

    class ComputeUnitKind:
        cpu = staticmethod(lambda: "cpu")
        gpu = staticmethod(lambda: "gpu")
        neural_engine = staticmethod(lambda: "neural engine")

    class SpecializationOptions:
        is_supported = staticmethod(lambda: core.supported)

        @classmethod
        def from_preferred_compute_unit_kind(cls, compute_unit_kind: Any) -> Any:
            return f"prefers {compute_unit_kind}"

    module = ModuleType("coreai.runtime")
    members = {c.__name__: c for c in (AIModel, NDArray, ComputeUnitKind, SpecializationOptions)}
    vars(module).update(members, InferenceFunction=Function)
    return module


def with_core_ai(monkeypatch: pytest.MonkeyPatch) -> CoreAI:
    """Let this machine pass for a Mac with Core AI, with Apple's packages installed."""
    core, real = CoreAI(), importlib.metadata.version
    monkeypatch.setattr(iphone.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(iphone.platform, "mac_ver", lambda: ("27.0", ("", "", ""), "arm64"))
    monkeypatch.setattr(iphone, "thermal_state", lambda: "nominal")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1" if name.startswith("coreai") else real(name))
    monkeypatch.setitem(sys.modules, "coreai", ModuleType("coreai"))
    monkeypatch.setitem(sys.modules, "coreai.runtime", runtime(core))
    return core
