"""Core ML's backends, on a Mac and a phone that are stand-ins; what runs on real ones is in test_backends.py."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
from pathlib import Path
from typing import Any

import pytest

from archsearch import devices
from archsearch.latency import compute_plan, iphone
from archsearch.latency.base import DeviceLostError, MeasurementError
from archsearch.latency.coreml import AppleBackend
from archsearch.score import LatencyRecord
from snapgen.coreml import convert as coreml
from snapgen.coreml.package import quiet
from snapgen.errors import InputError
from tests.archsearch import apple_standin
from tests.archsearch.apple_standin import Bench, Mac, a_phone, async_wrapper, plans, remote_device
from tests.snapgen.nets import tiny

ARCH, LATENT, TOKENS = tiny(), 4, 3


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mac:
    apple_standin.no_conversion(monkeypatch, tmp_path)
    return apple_standin.on_a_mac(monkeypatch)


@pytest.fixture
def bench(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> Bench:  # noqa: ARG001
    return apple_standin.with_a_phone(monkeypatch)


def measured(device: str, **options: Any) -> LatencyRecord:
    return devices.backend(device, **options).measure(ARCH, LATENT, TOKENS)


def names(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind) for p in parameters]


def test_the_stand_ins_have_coremltools_own_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    real = {
        "from_spec_or_path": async_wrapper.MLModelAsyncWrapper.from_spec_or_path,
        "get_connected_devices": remote_device.Device.get_connected_devices,
        "prepare_for_model_debugging": remote_device.Device.prepare_for_model_debugging,
        "compile_model": async_wrapper.compile_model,
    }
    expected = {name: names(function) for name, function in real.items()}
    apple_standin.on_a_mac(monkeypatch)
    apple_standin.with_a_phone(monkeypatch)
    device = remote_device.Device
    for name, holder in (
        ("from_spec_or_path", async_wrapper.MLModelAsyncWrapper),
        ("get_connected_devices", device),
        ("prepare_for_model_debugging", device),
    ):
        assert names(getattr(holder, name)) == expected[name]
        assert inspect.iscoroutinefunction(getattr(holder, name)) == inspect.iscoroutinefunction(real[name])
    assert names(async_wrapper.compile_model) == expected["compile_model"][:2]
    net, local = apple_standin.net_on(Mac()), async_wrapper.LocalMLModelAsyncWrapper
    for name in ("load", "unload", "predict", "make_state_if_needed", "retrieve_compute_plan"):
        assert names(getattr(net, name)) == names(getattr(local, name))
        assert inspect.iscoroutinefunction(getattr(net, name)) == inspect.iscoroutinefunction(getattr(local, name))
    for name in ("is_alive", "stop", "send_file_to_app", "receive_file_from_app"):
        assert names(getattr(apple_standin.App, name)) == names(getattr(remote_device._AppSession, name))
    for name in (
        "get_compute_device_usage_for_mlprogram_operation",
        "get_estimated_cost_for_mlprogram_operation",
    ):
        assert names(getattr(apple_standin.Plan, name)) == names(getattr(plans.MLComputePlan, name))
    assert isinstance(plans.MLComputePlan.model_structure, property)


def test_what_we_use_beside_the_public_interface_is_there() -> None:
    service = remote_device._DeviceCtlRemoteService
    assert inspect.signature(service).parameters["max_attempts"].default == 20
    assert inspect.signature(service).parameters["poll_time"].default == iphone.POLL_SECONDS
    assert "_DeviceCtlRemoteService" in remote_device._RemoteMLModelService.load_on_device.__code__.co_names


def test_a_record_of_a_mac(mac: Mac) -> None:
    record = measured("coreml")
    assert (record.median_ms, record.load_ms, record.steady) == (20.0, 70.0, True)
    assert (record.device, record.compute_units, record.thermal_state) == ("coreml", "cpu_and_ne", "nominal")
    assert record.runtime.startswith("Core ML, coremltools 9")
    assert record.placement == {"ios18.conv": "Neural Engine 2", "ios18.gather": "CPU 1"}
    assert record.neural_engine_share == pytest.approx(0.9)
    assert record.neural_engine_operations == pytest.approx(2 / 3)
    assert mac.asked[0].name == "CPU_AND_NE"
    assert mac.asked[-1] == "unload"
    inputs = {name: (shape, str(dtype)) for name, (shape, dtype) in mac.asked[1].items()}
    assert inputs == {
        "sample": ((1, 3, 4, 4), "float16"),
        "time_features": ((1, 8), "float16"),
        "context": ((1, 3, 12), "float16"),
    }
    assert LatencyRecord.model_validate(record.model_dump(mode="json")) == record


def test_warm_up_is_discarded_and_unsteady_times_are_marked(mac: Mac) -> None:
    mac.seconds = lambda run: 0.1 if run < 4 else 0.02
    assert measured("coreml").median_ms == pytest.approx(20)
    mac.seconds = lambda run: 0.02 * 1.2 ** (run % 9)
    assert not measured("coreml", rule={"seconds": 0.2}).steady


@pytest.mark.usefixtures("mac")
def test_the_compute_units_and_the_weights_are_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    convert = coreml.convert_unet
    monkeypatch.setattr(coreml, "convert_unet", lambda *a, **k: (asked.append(k["options"]), convert(*a, **k))[1])
    records = [
        measured("coreml"),
        measured("coreml", compute_units="all"),
        measured("coreml", weights={"palette_bits": 6}),
        measured("coreml", weights={"int8": True}),
    ]
    assert len({record.conditions for record in records}) == 4
    assert [(o.palette_bits, o.int8) for o in asked] == [(None, False), (None, False), (6, False), (None, True)]


@pytest.mark.usefixtures("mac")
def test_operations_are_estimated() -> None:
    backend = devices.backend("coreml")
    assert isinstance(backend, AppleBackend)
    detailed = backend.detailed(ARCH, LATENT, TOKENS)
    assert [(op.name, op.unit, op.weight) for op in detailed.operations] == [
        ("a", "Neural Engine", 0.6),
        ("b", "Neural Engine", 0.3),
        ("c", "CPU", 0.1),
    ]
    assert detailed.operations[0].estimate(20)["estimated_ms"] == pytest.approx(12)


def test_a_plan_without_costs_or_no_plan_is_no_failure(mac: Mac) -> None:
    mac.plan = lambda: apple_standin.Plan(None)
    record = measured("coreml")
    assert record.neural_engine_share is None
    assert record.neural_engine_operations == pytest.approx(2 / 3)
    mac.plan = lambda: (_ for _ in ()).throw(ValueError("MLComputePlan is not supported."))
    record = measured("coreml")
    assert record.placement is record.neural_engine_operations is None


def test_operations_within_operations_are_placed() -> None:
    plan = apple_standin.Plan()
    main = plan.structure.program.functions["main"].block
    main.operations[:] = [apple_standin.operation("loop", "const", plan.placed)]
    assert [op.name for op in compute_plan.placed_operations(plan)] == ["a", "b", "c"]  # type: ignore[arg-type]


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("device", ["coreml", "iphone"])
def test_what_does_not_convert_is_a_failure(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Path:
        raise NotImplementedError("no op for\nthat")

    monkeypatch.setattr(coreml, "convert_unet", broken)
    with pytest.raises(MeasurementError, match=f"{ARCH.id} could not be measured on {device}: no op for that"):
        measured(device)


def test_what_does_not_load_on_a_mac_is_a_failure(mac: Mac) -> None:
    def broken() -> None:
        raise RuntimeError("Error compiling model")

    mac.load = broken
    with pytest.raises(MeasurementError, match="Error compiling model"):
        measured("coreml")


def test_what_takes_too_long_on_a_mac_is_a_failure(mac: Mac) -> None:
    mac.predict = lambda: 3600
    with pytest.raises(MeasurementError, match=r"timed out after 0\.3 s"):
        measured("coreml", timeout=0.3)


def test_what_is_not_finite_is_a_failure(mac: Mac) -> None:
    mac.value = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        measured("coreml")


def test_a_record_of_a_phone(bench: Bench) -> None:
    record = measured("iphone")
    assert (record.median_ms, record.load_ms, record.steady) == (20.0, 900.0, True)
    assert (record.device, record.chip, record.os) == ("iphone", "iPhone 15 Pro (iPhone16,1)", "iOS 18.1 (22B83)")
    assert record.thermal_state is None
    assert record.neural_engine_share == pytest.approx(0.9)
    (app,) = bench.apps
    assert app.called[0] == "Load"
    assert app.called[-1] == "Unload"
    assert app.runs < 20, "a prediction's files take seconds to pass"


def test_one_connection_serves_many_candidates(bench: Bench) -> None:
    backend = devices.backend("iphone")
    for _ in range(2):
        backend.measure(ARCH, LATENT, TOKENS)
    assert measured("iphone", compute_units="all").compute_units == "all"
    ((credentials, _),) = bench.connections
    assert credentials.development_team == "TEAM123456"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"Load": "refuse"}, "Failed to build the model execution plan"),
        ({"Load": "hang"}, r"timed out after 0\.3 s"),
        ({"Load": "crash"}, "for lack of memory"),
        ({"Prediction": "crash"}, "for lack of memory"),
        ({"Prediction": "cut"}, r"The device is not connected\."),
    ],
)
def test_a_failed_candidate_does_not_stop_the_study(
    fault: dict[str, str], reason: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cut" in fault.values():
        monkeypatch.setattr(iphone, "long_timeout", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(remote_device._DeviceCtlRemoteService.__init__, "__defaults__", (0.001, 3))
    bench.faults = [fault]
    with pytest.raises(MeasurementError, match=reason):
        measured("iphone", timeout=0.3 if "hang" in fault.values() else 60)
    assert not bench.apps[0].is_alive()
    assert measured("iphone").median_ms == 20
    assert len({folder for _, folder in bench.connections}) == 1, "the app is started again, not built again"


def test_a_phone_that_is_unplugged_is_lost(bench: Bench) -> None:
    bench.faults = [{"Prediction": "unplug"}]
    backend = devices.backend("iphone")
    with pytest.raises(DeviceLostError, match="Desk phone was disconnected") as lost:
        backend.measure(ARCH, LATENT, TOKENS)
    assert "cable" in lost.value.remedy
    with pytest.raises(DeviceLostError, match="no phone is connected"):
        backend.measure(ARCH, LATENT, TOKENS)
    bench.phones = [a_phone()]
    assert backend.measure(ARCH, LATENT, TOKENS).median_ms == 20


def test_coremltools_timeout_is_extended_and_restored() -> None:
    own = remote_device._DeviceCtlRemoteService
    with iphone.long_timeout(1800):
        assert remote_device._DeviceCtlRemoteService(socket=None).max_attempts == 3600
    assert remote_device._DeviceCtlRemoteService is own


def test_an_app_that_cannot_be_built_or_started_loses_the_device(bench: Bench) -> None:
    failure = remote_device._AppBuilder.Error(message=None, error_code=65)
    output = b"building\nerror: No Account for Team TEAM123456\nmore"
    failure.__context__ = subprocess.CalledProcessError(65, "xcodebuild", output=output)
    bench.build = failure
    with pytest.raises(DeviceLostError, match="No Account for Team TEAM123456") as lost:
        measured("iphone")
    assert "Xcode" in lost.value.remedy
    bench.build, bench.starts = None, False
    with pytest.raises(DeviceLostError, match="does not start"):
        measured("iphone")


@pytest.mark.parametrize(
    ("phones", "named"),
    [
        ([], "no phone is connected; connect the phone by cable"),
        ([a_phone("A"), a_phone("B")], "several phones are connected: A, B; name one"),
        ([a_phone(os_version="17.6")], "runs iOS 17.6; update it"),
        ([a_phone(developer_mode_state="disabled")], "not in developer mode; switch it on"),
    ],
)
def test_an_unusable_phone_is_an_error_at_once(phones: list[Any], named: str, bench: Bench) -> None:
    bench.phones = phones
    with pytest.raises(InputError, match=named):
        devices.backend("iphone")


def test_a_phone_is_known_by_its_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.phones = [a_phone("A"), a_phone("B", os_version="18.5")]
    assert measured("iphone", phone="B").os.startswith("iOS 18.5")
    monkeypatch.setenv("ARCHSEARCH_PHONE", "C")
    with pytest.raises(InputError, match="no phone called 'C' is connected, only A, B"):
        devices.backend("iphone")


@pytest.mark.usefixtures("bench")
def test_missing_team_xcode_or_macos_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCHSEARCH_SIGNING_TEAM")
    with pytest.raises(InputError, match="needs a signing team; set ARCHSEARCH_SIGNING_TEAM"):
        devices.backend("iphone")
    monkeypatch.setattr(iphone.shutil, "which", lambda _: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="needs Xcode: xcodebuild was not found; install Xcode"):
        devices.backend("iphone", team="TEAM123456")
    monkeypatch.setattr(iphone.platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    for device in ("coreml", "iphone"):
        with pytest.raises(InputError, match=r"needs macOS 15, but this is 14\.7; update macOS"):
            devices.backend(device)


@pytest.mark.parametrize("device", ["coreml", "iphone"])
def test_without_a_mac_there_is_a_remedy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iphone.platform, "system", lambda: "Linux")
    with pytest.raises(
        InputError, match=f"{device} needs a Mac, but this is Linux; run archsearch serve-device on a Mac"
    ):
        devices.backend(device)


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"compute_units": "gpu"}, "compute_units"),
        ({"weights": {"int8": True, "palette_bits": 6}}, "weights"),
        ({"weights": {"palette_bits": 5}}, r"weights\.palette_bits"),
        ({"timeout": 0}, "timeout"),
        ({"team": "X; rm -rf ~"}, "team"),
        ({"bundle_id": "$(id)"}, "bundle_id"),
        ({"threads": 1}, "threads: unknown key"),
    ],
)
def test_wrong_settings_are_placed(options: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match=place):
        devices.backend("iphone", **options)


@pytest.mark.parametrize(
    ("output", "state"),
    [
        ("Note: No thermal warning level has been recorded\n", "nominal"),
        ("\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 100\n", "nominal"),
        ("\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 62\n", "CPU_Speed_Limit 62"),
        ("", None),
    ],
)
def test_the_thermal_state_is_what_pmset_says(output: str, state: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iphone.subprocess, "run", lambda *a, **_: subprocess.CompletedProcess(a, 0, output, ""))
    assert iphone.thermal_state() == state


def test_a_package_takes_what_is_fed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one conversion here: its inputs are those that a run is given."""
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path))
    from archsearch.latency.coreml import model_inputs

    package = coreml.convert_unet(ARCH, LATENT, context_tokens=TOKENS)
    with quiet():
        import coremltools

        spec = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()
    expected = {i.name: tuple(i.type.multiArrayType.shape) for i in spec.description.input}
    assert {name: array.shape for name, array in model_inputs(ARCH, LATENT, TOKENS).items()} == expected
