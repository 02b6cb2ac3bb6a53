"""Latency backend for Core AI on this Mac.

This code has not been run on a Mac yet; it is tested against a stand-in at the interface of coreai-core's runtime.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from archsearch.latency import iphone
from archsearch.latency.base import MeasurementError
from archsearch.latency.coreml import AppleBackend, CoreMLConfig, ModelInputs, Run
from archsearch.latency.iphone import AsyncRunner
from archsearch.latency.steady_state import time_until_steady
from snapgen import config
from snapgen.coreai import COREAI
from snapgen.errors import InputError

MIN_MACOS = 27
"""The first macOS with Core AI."""


class CoreAIConfig(CoreMLConfig):
    """Settings of measurements with Core AI."""

    compute_units: Literal["neural_engine", "gpu", "cpu"] = "neural_engine"  # type: ignore[assignment]
    """Compute unit that Core AI is to prefer. It does not tell which one ran a net."""


class CoreAIBackend(AppleBackend):
    """Measures on this Mac with Core AI, in float16 with random weights.

    The time of a run is that of the call, since Core AI reports none: it includes the hand-over of inputs and outputs.
    """

    device, target, tool = "coreai", COREAI, "coreai-core"

    def _run(self, package: Path, inputs: ModelInputs) -> Run:
        runtime = importlib.import_module("coreai.runtime")
        loop = AsyncRunner()
        call = self._calls(loop)
        kind = getattr(runtime.ComputeUnitKind, self.options.compute_units)()
        preferred = runtime.SpecializationOptions.from_preferred_compute_unit_kind(kind)
        try:
            start = time.perf_counter()
            function = call(runtime.AIModel.load(package, preferred)).load_function("main")
            load_ms = (time.perf_counter() - start) * 1e3
            arrays = {name: runtime.NDArray(array) for name, array in inputs.items()}

            async def timed() -> tuple[float, Any]:
                begun = time.perf_counter()
                outputs = await function(arrays)
                return time.perf_counter() - begun, outputs

            def run() -> float:
                seconds, outputs = call(timed())
                if not all(np.isfinite(output.numpy()).all() for output in outputs.values()):
                    raise MeasurementError("its output with random weights is not finite")
                return float(seconds)

            return Run(load_ms, time_until_steady(run, self.options.rule), ())
        finally:
            loop.stop()


def on_mac(options: Mapping[str, Any]) -> CoreAIBackend:
    """The backend ``coreai``.

    Raises:
        InputError: if this is no Mac with Core AI, its packages are missing, or an option is invalid.
    """
    iphone.check_mac("coreai", MIN_MACOS)
    COREAI.versions()
    os.environ.setdefault("USE_OS_COREAI", "1")  # read on import: the runtime within the package runs on the CPU alone
    if not importlib.import_module("coreai.runtime").SpecializationOptions.is_supported():
        raise InputError("latency", "Core AI's runtime was imported without the system's", "set USE_OS_COREAI=1")
    return CoreAIBackend(config.parse_config(dict(options), CoreAIConfig, source="latency"))
