"""Latency backends for Core ML: on this Mac and on a connected iPhone.

This code has not been run on a Mac or a phone yet; it is tested against stand-ins for coremltools' interface.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from archsearch import machine
from archsearch.latency import iphone
from archsearch.latency.base import DeviceLostError, MeasurementError, measurement_errors, sample_inputs
from archsearch.latency.compute_plan import (
    DetailedRecord,
    PlacedOp,
    by_operator,
    neural_engine_share,
    placed_operations,
)
from archsearch.latency.iphone import AsyncRunner, Phone
from archsearch.latency.steady_state import RunTimes, SteadyStateConfig, time_until_steady
from archsearch.score import LatencyRecord
from snapgen import config
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.coreml import convert
from snapgen.coreml.package import Target, quiet
from snapgen.errors import InputError

if TYPE_CHECKING:
    from coremltools.models.ml_program.experimental.remote_device import Device

ModelInputs = dict[str, np.ndarray[Any, np.dtype[np.float16]]]

NAME = r"^[A-Za-z0-9.\-]+$"
"""Pattern of signing identifiers, which coremltools inserts into a shell command."""


class CoreMLConfig(Config):
    """Settings of measurements on a Mac."""

    compute_units: Literal["all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"] = "cpu_and_ne"
    """Compute units that Core ML may use; ``cpu_and_ne`` leaves a phone's GPU free for its display."""
    weights: convert.PackageOptions = convert.PackageOptions()
    """How the weights are stored."""
    rule: SteadyStateConfig = SteadyStateConfig()
    """When repeated runs count as steady."""
    timeout: float = Field(default=900, gt=0)
    """Seconds before the measurement of a candidate is aborted, excluding its conversion."""


class IPhoneConfig(CoreMLConfig):
    """Settings of measurements on an iPhone. Settings of the phone and its app default to environment variables."""

    rule: SteadyStateConfig = SteadyStateConfig(block_seconds=0.002, seconds=240)
    """Steady-state rule. Transferring a prediction's files takes seconds, so a block consists of one or two runs."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds after which a candidate is given up, not counting its conversion."""
    phone: str | None = None
    """Name or identifier of the phone, if several are connected; environment variable ARCHSEARCH_PHONE."""
    team: str | None = Field(default=None, pattern=NAME)
    """Signing team of the app; environment variable ARCHSEARCH_SIGNING_TEAM."""
    bundle_id: str | None = Field(default=None, pattern=NAME)
    """Bundle identifier of the app; environment variable ARCHSEARCH_BUNDLE_ID."""
    profile: str | None = Field(default=None, pattern=NAME)
    """UUID of a provisioning profile, instead of the team; environment variable ARCHSEARCH_PROVISIONING_PROFILE."""


ENVIRONMENT = {
    "phone": "ARCHSEARCH_PHONE",
    "team": "ARCHSEARCH_SIGNING_TEAM",
    "bundle_id": "ARCHSEARCH_BUNDLE_ID",
    "profile": "ARCHSEARCH_PROVISIONING_PROFILE",
}


class Run(NamedTuple):
    """Times of a net on a device, and where its operations ran if that is known."""

    load_ms: float
    timing: RunTimes
    operations: tuple[PlacedOp, ...]


class AppleBackend:
    """Measures nets on an Apple device, in float16 with random weights."""

    device: str
    target: Target
    """What the nets are converted to."""
    tool: str
    """The package whose version a record names."""

    def __init__(self, options: CoreMLConfig) -> None:
        self.options = options

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `archsearch.latency.base.Backend.measure`."""
        return self.detailed(arch, latent_size, context_tokens).record

    def detailed(self, arch: Architecture, latent_size: int, context_tokens: int) -> DetailedRecord:
        """Measure latency and report operations.

        Raises:
            InputError, MeasurementError, DeviceLostError: like `measure`.
        """
        arch.validate_latent_size(latent_size)
        with measurement_errors(arch, self.device):
            package = convert.convert_unet(
                arch, latent_size, context_tokens=context_tokens, options=self.options.weights, target=self.target
            )
            run = self._run(package, model_inputs(arch, latent_size, context_tokens))
        return DetailedRecord(self._record(run), run.operations)

    def _run(self, package: Path, inputs: ModelInputs) -> Run:
        raise NotImplementedError

    def _calls(
        self, loop: AsyncRunner, alive: Callable[[], bool] = lambda: True
    ) -> Callable[[Coroutine[Any, Any, Any]], Any]:
        """Runs coroutines in a loop until the measurement of a candidate times out, from now on."""
        deadline = time.monotonic() + self.options.timeout

        def call(work: Coroutine[Any, Any, Any]) -> Any:
            try:
                return loop.call(work, deadline - time.monotonic(), alive=alive)
            except TimeoutError:
                raise MeasurementError(f"timed out after {self.options.timeout:g} s") from None

        return call

    def _record(self, run: Run) -> LatencyRecord:
        cost_share, operation_share = neural_engine_share(run.operations)
        weights = self.options.weights
        compression = f", {weights.palette_bits}-bit weights" if weights.palette_bits else ", int8 weights"
        return LatencyRecord(
            **run.timing.fields(),
            device=self.device,
            compute_units=self.options.compute_units,
            load_ms=run.load_ms,
            runtime=f"{self.target.title}, {self.tool} {machine.installed(self.tool)}"
            + (compression if weights != convert.PackageOptions() else ""),
            placement=by_operator(run.operations) if run.operations else None,
            neural_engine_share=cost_share,
            neural_engine_operations=operation_share,
            **self._conditions(),
        )

    def _conditions(self) -> dict[str, Any]:
        return {"chip": machine.chip(), "os": machine.operating_system(), "thermal_state": iphone.thermal_state()}


class CoreMLBackend(AppleBackend):
    """Measures on this Mac with Core ML, in float16 with random weights.

    The time of a run is the duration of Core ML's prediction as reported by coremltools, without Python's overhead.
    `archsearch.latency.steady_state.time_until_steady` determines the number of runs.
    """

    device, target, tool = "coreml", convert.COREML, "coremltools"

    def _run(self, package: Path, inputs: ModelInputs) -> Run:
        loop = AsyncRunner()
        try:
            return self._measure(package, inputs, loop, None)
        finally:
            loop.stop()

    def _measure(self, package: Path, inputs: ModelInputs, loop: AsyncRunner, device: Device | None) -> Run:
        alive = device.session.is_alive if device else lambda: True
        call = self._calls(loop, alive)
        model = _model(package, self.options.compute_units, device)
        try:
            call(model.load())

            def run() -> float:
                outputs = call(model.predict(dict(inputs), None))
                if not all(np.isfinite(array).all() for array in outputs.values()):
                    raise MeasurementError("its output with random weights is not finite")
                return _seconds(model.last_predict_duration_in_nano_seconds)

            timing = time_until_steady(run, self.options.rule)
            operations: tuple[PlacedOp, ...] = ()
            with contextlib.suppress(Exception):  # the measurement is complete; the plan is optional
                operations = placed_operations(call(model.retrieve_compute_plan()))
            return Run(_seconds(model.load_duration_in_nano_seconds) * 1e3, timing, operations)
        finally:
            with contextlib.suppress(Exception):  # the device may be disconnected
                loop.call(model.unload(), 10, alive=alive)
            model.cleanup()


class IPhoneBackend(CoreMLBackend):
    """Measures on a connected iPhone, through the app that coremltools installs on it.

    Run and load times are measured on the phone. It rests while files are transferred between predictions, so the times
    are those of a cool phone. The chip of a record is the phone's model, which determines the chip.
    """

    device = "iphone"

    def __init__(self, options: IPhoneConfig, phone: Phone) -> None:
        super().__init__(options)
        self._phone = phone

    def _run(self, package: Path, inputs: ModelInputs) -> Run:
        """Measure; after a failure the app is stopped, and the next net starts a new one."""
        device, loop = self._phone.connect()
        try:
            with iphone.long_timeout(self.options.timeout):
                return self._measure(package, inputs, loop, device)
        except Exception as error:
            self._phone.disconnect()
            if not self._phone.present():
                raise DeviceLostError(f"{self._phone.device.name} was disconnected", iphone.RECONNECT) from None
            raise MeasurementError(iphone.summarize_error(error)) from error

    def _conditions(self) -> dict[str, Any]:
        device = self._phone.device
        return {"chip": self._phone.model, "os": f"iOS {device.os_version} ({device.os_build_number})"}


def on_mac(options: Mapping[str, Any]) -> CoreMLBackend:
    """Build the ``coreml`` backend.

    Raises:
        InputError: if this is not a Mac, or for an invalid option.
    """
    iphone.check_mac("coreml")
    return CoreMLBackend(config.parse_config(dict(options), CoreMLConfig, source="latency"))


def on_phone(options: Mapping[str, Any]) -> IPhoneBackend:
    """The backend ``iphone``.

    Raises:
        InputError: for a wrong option, or if this is no Mac, has no Xcode, no signing team or no phone.
    """
    wanted = phone_config(options)
    return IPhoneBackend(wanted, iphone.phone(wanted.phone, wanted.team, wanted.profile, wanted.bundle_id))


def phone_config(options: Mapping[str, Any]) -> IPhoneConfig:
    """The settings of the backend ``iphone``, from its options and the environment.

    Raises:
        InputError: for a wrong option, or if this is no Mac or there is no signing team.
    """
    iphone.check_mac("iphone")
    defaults = {key: os.environ[name] for key, name in ENVIRONMENT.items() if os.environ.get(name)}
    settings = config.parse_config({**defaults, **options}, IPhoneConfig, source="latency")
    if settings.team is None and settings.profile is None:
        remedy = "set ARCHSEARCH_SIGNING_TEAM to the team's identifier, from developer.apple.com/account"
        raise InputError("iphone", "the app for measuring needs a signing team", remedy)
    return settings


def model_inputs(arch: Architecture, latent_size: int, context_tokens: int) -> ModelInputs:
    """Float16 inputs of a converted net."""
    from snapgen.coreml.layers import time_features

    inputs = sample_inputs(arch, latent_size, context_tokens)
    inputs["time_features"] = time_features(inputs.pop("timestep"), arch.time.embed_dim)
    if not arch.has_cross_attention:
        del inputs["context"]
    return {name: tensor.numpy().astype(np.float16) for name, tensor in inputs.items()}


def _model(package: Path, compute_units: str, device: Device | None) -> Any:
    """A model that is not loaded yet: coremltools' ``MLModelAsyncWrapper``, which is only partly typed."""
    with quiet():
        from coremltools import ComputeUnit
        from coremltools.models.ml_program.experimental.async_wrapper import MLModelAsyncWrapper

        return MLModelAsyncWrapper.from_spec_or_path(
            str(package),
            weights_dir=str(package / "Data" / "com.apple.CoreML" / "weights"),
            compute_units=ComputeUnit[compute_units.upper()],
            device=device,
        )


def _seconds(nanoseconds: int | None) -> float:
    if nanoseconds is None:
        raise MeasurementError("Core ML reported no duration")
    return nanoseconds / 1e9
