"""A Mac and a phone that are not there, at coremltools' own interface.

The Mac's net stands in for ``MLModelAsyncWrapper``. The phone stands in for the app on it, and for the cable: all of
coremltools between the two is the real one, except what only macOS has, its compiler and its compute plans.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.latency import iphone
from snapgen.coreml import convert
from snapgen.coreml.package import quiet

with quiet():
    from coremltools.models import compute_plan as plans
    from coremltools.models.compute_device import MLCPUComputeDevice, MLNeuralEngineComputeDevice
    from coremltools.models.ml_program.experimental import async_wrapper, remote_device

Device, DeviceState, DeviceType = remote_device.Device, remote_device.DeviceState, remote_device.DeviceType


class NeuralEngine(MLNeuralEngineComputeDevice):  # type: ignore[misc]
    def __init__(self) -> None: ...


class CPU(MLCPUComputeDevice):  # type: ignore[misc]
    def __init__(self) -> None: ...


def operation(name: str, operator: str, inner: Sequence[Any] = ()) -> Any:
    outputs = [plans.MLModelStructureProgramNamedValueType(name, plans.MLModelStructureProgramValueType())]
    blocks = [plans.MLModelStructureProgramBlock([], list(inner), [])] if inner else []
    return plans.MLModelStructureProgramOperation({}, operator, outputs, blocks, None)


class Plan:
    """A constant, two convolutions on the engine and a gather on the CPU, 90 % of the cost on the engine."""

    def __init__(self, weights: tuple[float, ...] | None = (0.6, 0.3, 0.1)) -> None:
        names = [("a", "ios18.conv"), ("b", "ios18.conv"), ("c", "ios18.gather")]
        self.placed = [operation(*name) for name in names]
        self.weights = weights
        block = plans.MLModelStructureProgramBlock([], [operation("k", "const"), *self.placed], [])
        program = plans.MLModelStructureProgram({"main": plans.MLModelStructureProgramFunction([], block)})
        self.structure = plans.MLModelStructure(None, program, None)

    @property
    def model_structure(self) -> Any:
        return self.structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if operation.operator_name == "const":
            return None
        unit = CPU() if operation.operator_name == "ios18.gather" else NeuralEngine()
        return plans.MLComputePlanDeviceUsage(unit, [unit, CPU()])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        if self.weights is None:
            return None
        return plans.MLComputePlanCost(self.weights[[id(op) for op in self.placed].index(id(operation))])


@dataclass
class Mac:
    """What this Mac's Core ML does with a net."""

    seconds: Callable[[int], float] = lambda _: 0.02
    """Of each prediction."""
    load: Callable[[], None] = lambda: None
    predict: Callable[[], Any] = lambda: None
    """Called before; a number that it gives is waited."""
    plan: Callable[[], Any] = Plan
    value: float = 0.5
    runs: int = 0
    asked: list[Any] = field(default_factory=list)


def net_on(mac: Mac) -> type[Any]:
    class Net(async_wrapper.MLModelAsyncWrapper):  # type: ignore[misc]
        """Its methods are the abstract ones' own, or it could not be made."""

        loaded = False

        async def load(self) -> None:
            mac.load()
            self.loaded = True

        async def unload(self) -> None:
            self.loaded = False
            mac.asked.append("unload")

        async def predict(self, inputs: dict[str, Any], state: Any = None) -> dict[str, Any]:  # noqa: ARG002 - coremltools' name
            assert self.loaded
            await asyncio.sleep(mac.predict() or 0)
            mac.runs += 1
            mac.asked.append({name: (array.shape, array.dtype) for name, array in inputs.items()})
            return {"velocity": np.full(inputs["sample"].shape, mac.value, np.float16)}

        def make_state_if_needed(self) -> None:
            return None

        async def retrieve_compute_plan(self) -> Any:
            return mac.plan()

        @property
        def load_duration_in_nano_seconds(self) -> int:
            return 70_000_000

        @property
        def last_predict_duration_in_nano_seconds(self) -> int:
            return int(mac.seconds(mac.runs - 1) * 1e9)

    return Net


@dataclass
class Bench:
    """The phones on a desk; what happens to them, by connection and method."""

    phones: list[Any] = field(default_factory=lambda: [a_phone()])
    faults: list[dict[str, str]] = field(default_factory=list)
    """One a connection: a method to ``refuse``, ``hang``, ``crash``, ``unplug`` or (the cable) ``cut``."""
    seconds: Callable[[int], float] = lambda _: 0.02
    connections: list[tuple[Any, Path]] = field(default_factory=list)
    apps: list[App] = field(default_factory=list)
    starts: bool = True
    build: Exception | None = None
    plan: Callable[[], Any] = Plan


def a_phone(name: str = "Desk phone", **changes: Any) -> Any:
    values = {
        "name": name,
        "type": DeviceType.IPHONE,
        "identifier": f"id-{name}".replace(" ", "-"),
        "udid": "00008130",
        "os_version": "18.1",
        "os_build_number": "22B83",
        "developer_mode_state": "enabled",
        "state": DeviceState.CONNECTED,
        "session": None,
    }
    return Device(**{**values, **changes})


class App:
    """The app on the phone, and the files that go to it and come from it."""

    def __init__(self, bench: Bench, working_directory: Path, faults: dict[str, str]) -> None:
        self.bench, self.working_directory, self.faults = bench, working_directory, faults
        self.answers: dict[str, dict[str, bytes]] = {}
        self.called: list[str] = []
        self.runs, self.running, self.reached = 0, bench.starts, True

    def is_alive(self) -> bool:
        return self.running

    def stop(self) -> None:
        self.running = False

    def send_file_to_app(self, source_path: Path, destination: str) -> Any:
        self._reach()
        if destination.endswith("message.json"):
            self._take(json.loads(Path(source_path).read_text()))
        return remote_device._DataTransferInfo(str(source_path), destination)

    def receive_file_from_app(self, destination_path: Path, source: str) -> Any:
        self._reach()
        *_, number, name = source.split("/")
        if name not in self.answers.get(number, {}):
            raise remote_device._DeviceCtlError(message=b"No such file", error_code=1)
        Path(destination_path).write_bytes(self.answers[number][name])
        return remote_device._DataTransferInfo(source, str(destination_path))

    def _reach(self) -> None:
        if not self.reached:
            raise remote_device._DeviceCtlError(message=b"The device is not connected.", error_code=1)

    def _take(self, message: dict[str, Any]) -> None:
        method = message["method"].removeprefix("MLModelService.")
        self.called.append(method)
        fault = self.faults.get(method)
        if fault in ("crash", "unplug"):
            self.running = False
            self.reached = fault != "unplug"
            self.bench.phones = [] if fault == "unplug" else self.bench.phones
        elif fault == "cut":
            self.reached = False
        elif fault == "refuse":
            self._answer(message["id"], error={"code": -32000, "message": "Failed to build the model execution plan"})
        elif fault is None:
            self._answer(message["id"], **getattr(self, method.lower())(message["params"]))

    def _answer(self, number: str, *, data: bytes | None = None, **message: Any) -> None:
        resource = {"resource": "out.bin"} if data is not None else {}
        files = {"message.json": json.dumps({"id": number, **message, **resource}).encode()}
        self.answers[number] = {**files, **({"out.bin": data} if data is not None else {})}

    def load(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"result": {"modelID": params["modelID"], "duration": 900_000_000}}

    def unload(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"result": {"modelID": params["modelID"]}}

    def prediction(self, params: dict[str, Any]) -> dict[str, Any]:
        seconds = self.bench.seconds(self.runs)
        self.runs += 1
        shape = params["inputs"]["sample"]["shape"]
        data = np.full(shape, 0.5, np.float16)
        strides = [stride // 2 for stride in data.strides]
        storage = {"offset": 0, "size": data.nbytes}
        output = {"shape": shape, "strides": strides, "dataType": "Float16", "storage": storage}
        result = {"modelID": params["modelID"], "duration": int(seconds * 1e9), "outputs": {"velocity": output}}
        return {"result": result, "data": data.tobytes()}


def no_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "net.mlpackage"
    package.mkdir()
    monkeypatch.setattr(convert, "convert_unet", lambda *_, **__: package)


def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    """Let this machine pass for a Mac."""
    mac = Mac()
    monkeypatch.setattr(iphone.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(iphone.platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64"))
    monkeypatch.setattr(iphone, "thermal_state", lambda: "nominal")

    def from_spec_or_path(
        spec_or_path: Any,
        weights_dir: str,
        compute_units: Any = async_wrapper.ComputeUnit.ALL,
        function_name: str | None = None,
        optimization_hints: Any = None,
        device: Any = None,
    ) -> Any:
        arguments = (spec_or_path, weights_dir, compute_units, function_name, optimization_hints)
        if device is not None:
            return async_wrapper.RemoteMLModelAsyncWrapper(
                spec_or_path, weights_dir, device, compute_units, function_name, optimization_hints
            )
        mac.asked.append(compute_units)
        return net_on(mac)(*arguments)

    monkeypatch.setattr(async_wrapper.MLModelAsyncWrapper, "from_spec_or_path", staticmethod(from_spec_or_path))
    return mac


def with_a_phone(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Let a phone pass for connected to it, and Xcode for installed."""
    bench = Bench()
    iphone.phone.cache_clear()
    monkeypatch.setattr(iphone.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(iphone, "marketing_name", lambda _: "iPhone 15 Pro (iPhone16,1)")
    monkeypatch.setattr(iphone, "START_SECONDS", 0.0)
    monkeypatch.setattr(iphone, "WATCH_SECONDS", 0.02)
    monkeypatch.setenv("ARCHSEARCH_SIGNING_TEAM", "TEAM123456")

    def get_connected_devices(device_type: Any) -> list[Any]:
        return [phone for phone in bench.phones if phone.type == device_type]

    async def prepare_for_model_debugging(
        self: Any,
        credentials: Any = None,
        working_directory: Path | None = None,
        clean: bool = False,  # noqa: ARG001 - coremltools' name
    ) -> Any:
        assert working_directory is not None
        bench.connections.append((credentials, working_directory))
        if bench.build:
            raise bench.build
        files = working_directory / "build"
        files.mkdir(exist_ok=True)
        number = len(bench.connections) - 1
        bench.apps.append(App(bench, files, bench.faults[number] if number < len(bench.faults) else {}))
        return replace(self, session=bench.apps[-1])

    async def retrieve_compute_plan(_: Any) -> Any:
        return bench.plan()

    def compile_model(model: Any, destination_path: str | None = None) -> str:
        assert destination_path is not None
        shutil.copytree(model, destination_path)
        return destination_path

    monkeypatch.setattr(Device, "get_connected_devices", staticmethod(get_connected_devices))
    monkeypatch.setattr(Device, "prepare_for_model_debugging", prepare_for_model_debugging)
    monkeypatch.setattr(async_wrapper.RemoteMLModelAsyncWrapper, "retrieve_compute_plan", retrieve_compute_plan)
    monkeypatch.setattr(async_wrapper, "compile_model", compile_model)
    return bench
