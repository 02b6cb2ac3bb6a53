"""Latency under Core ML: on this Mac, and on a phone that is connected to it.

Nothing here has been run on a Mac or a phone yet; it is tested against stand-ins of coremltools' own interface.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from archsearch import machine
from archsearch.latency import iphone
from archsearch.latency.base import DeviceLostError, MeasurementError, sample_inputs
from archsearch.latency.compute_plan import DetailedRecord, PlacedOp, by_operator, placed, shares
from archsearch.latency.iphone import AppTerminated, AsyncRunner, Phone, SigningCredentials
from archsearch.latency.steady_state import RunTimes, SteadyStateConfig, time_until_steady
from archsearch.score import LatencyRecord
from snapgen import config
from snapgen.architecture.schema import Architecture
from snapgen.config import Config
from snapgen.coreml import convert
from snapgen.coreml.package import quiet
from snapgen.errors import InputError

if TYPE_CHECKING:
    from coremltools.models.ml_program.experimental.remote_device import Device

T = TypeVar("T")
ModelInputs = dict[str, np.ndarray[Any, np.dtype[np.float16]]]

NAME = r"^[A-Za-z0-9.\-]+$"
"""Signing's names go into a shell's command, which coremltools writes."""


class CoreMLConfig(Config):
    """How a Mac is timed."""

    compute_units: Literal["all", "cpu_and_ne", "cpu_and_gpu", "cpu_only"] = "cpu_and_ne"
    """Which Core ML may use; ``cpu_and_ne`` leaves the phone's GPU to its screen."""
    weights: convert.PackageOptions = convert.PackageOptions()
    rule: SteadyStateConfig = SteadyStateConfig()
    timeout: float = Field(default=900, gt=0)
    """Seconds after which a candidate is given up; its conversion is not in them."""


class IPhoneConfig(CoreMLConfig):
    """How a phone is timed; what is not said about it and its app is taken from the environment."""

    rule: SteadyStateConfig = SteadyStateConfig(block_seconds=0.002, seconds=240)
    """A prediction's files take seconds to pass, so that a block is a run or two."""
    timeout: float = Field(default=1800, gt=0)
    phone: str | None = None
    """Its name or identifier; ARCHSEARCH_PHONE. Only needed if several are connected."""
    team: str | None = Field(default=None, pattern=NAME)
    """Signs the app; ARCHSEARCH_SIGNING_TEAM."""
    bundle_id: str | None = Field(default=None, pattern=NAME)
    """ARCHSEARCH_BUNDLE_ID."""
    profile: str | None = Field(default=None, pattern=NAME)
    """UUID of a provisioning profile, instead of the team; ARCHSEARCH_PROVISIONING_PROFILE."""


ENVIRONMENT = {
    "phone": "ARCHSEARCH_PHONE",
    "team": "ARCHSEARCH_SIGNING_TEAM",
    "bundle_id": "ARCHSEARCH_BUNDLE_ID",
    "profile": "ARCHSEARCH_PROVISIONING_PROFILE",
}


class _Run(NamedTuple):
    load_ms: float
    timing: RunTimes
    operations: tuple[PlacedOp, ...]


class CoreMLBackend:
    """This Mac: Core ML on the units that are asked for, float16, random weights.

    A run's time is that of Core ML's own prediction, as coremltools reports it, without what Python adds.
    `archsearch.latency.steady_state.time_until_steady` says how often a net is run.
    """

    device = "coreml"

    def __init__(self, options: CoreMLConfig) -> None:
        self.options = options

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:
        """See `archsearch.latency.base.Backend.measure`."""
        return self.detailed(arch, latent_size, context_tokens).record

    def detailed(self, arch: Architecture, latent_size: int, context_tokens: int) -> DetailedRecord:
        """A measurement, with its operations.

        Raises:
            InputError, LatencyFailure, DeviceLost: as `measure`.
        """
        arch.check_latent(latent_size)
        try:
            package = convert.convert_unet(
                arch, latent_size, context_tokens=context_tokens, options=self.options.weights
            )
            found = self._run(package, _feed(arch, latent_size, context_tokens))
        except (InputError, DeviceLostError):
            raise
        except Exception as error:  # coremltools' and Core ML's errors share no class but Exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MeasurementError(f"{arch.id} could not be timed on {self.device}: {reason}") from error
        return DetailedRecord(self._record(found), found.operations)

    def _run(self, package: Path, feed: ModelInputs) -> _Run:
        loop = AsyncRunner()
        try:
            return self._timed(package, feed, loop, None, lambda: True)
        except TimeoutError:
            raise MeasurementError(f"not done after {self.options.timeout:g} s") from None
        finally:
            loop.stop()

    def _timed(
        self, package: Path, feed: ModelInputs, loop: AsyncRunner, device: Device | None, alive: Callable[[], bool]
    ) -> _Run:
        deadline = time.monotonic() + self.options.timeout

        def call(work: Coroutine[Any, Any, T]) -> T:
            return loop.call(work, deadline - time.monotonic(), alive=alive)

        model = _model(package, self.options.compute_units, device)
        try:
            call(model.load())

            def run() -> float:
                outputs = call(model.predict(dict(feed), None))
                if not all(np.isfinite(array).all() for array in outputs.values()):
                    raise MeasurementError("its output with random weights is not finite")
                return _seconds(model.last_predict_duration_in_nano_seconds)

            timing = time_until_steady(run, self.options.rule)
            operations: tuple[PlacedOp, ...] = ()
            with contextlib.suppress(Exception):  # it has been timed; where its operations are is only told beside it
                operations = placed(call(model.retrieve_compute_plan()))
            return _Run(_seconds(model.load_duration_in_nano_seconds) * 1e3, timing, operations)
        finally:
            try:
                loop.call(model.unload(), 10, alive=alive)
            except Exception:  # the device may be gone
                iphone.detach(model)
            model.cleanup()

    def _record(self, found: _Run) -> LatencyRecord:
        lower, median, upper = (seconds * 1e3 for seconds in found.timing.quartiles())
        there = shares(found.operations) if found.operations else None
        weights = self.options.weights
        stored = f", {weights.palette_bits}-bit weights" if weights.palette_bits else ", int8 weights"
        return LatencyRecord(
            median_ms=median,
            lower_quartile_ms=lower,
            upper_quartile_ms=upper,
            runs=len(found.timing.runs),
            source="measured",
            device=self.device,
            compute_units=self.options.compute_units,
            load_ms=found.load_ms,
            runtime=f"Core ML, coremltools {machine.installed('coremltools')}"
            + (stored if weights != convert.PackageOptions() else ""),
            steady=found.timing.steady,
            placement=by_operator(found.operations) if found.operations else None,
            neural_engine_share=there.cost if there else None,
            neural_engine_operations=there.operations if there else None,
            **self._conditions(),
        )

    def _conditions(self) -> dict[str, Any]:
        return {"chip": machine.chip(), "os": machine.operating_system(), "thermal_state": iphone.thermal_state()}


class IPhoneBackend(CoreMLBackend):
    """A connected phone, through the app that coremltools puts on it.

    Times and loads are the phone's own. Between two predictions their files pass, in which it rests: these are the
    times of a cool phone. A record's chip is the phone's model, which says it.
    """

    device = "iphone"

    def __init__(self, options: IPhoneConfig, phone: Phone) -> None:
        super().__init__(options)
        self._phone = phone

    def _run(self, package: Path, feed: ModelInputs) -> _Run:
        """Once more over a new connection, if it is the connection that failed."""
        problem = ""
        for _ in range(2):
            device, loop = self._phone.connect()
            try:
                with iphone.own_temporary_folder(), iphone.long_timeout(self.options.timeout):
                    return self._timed(package, feed, loop, device, self._phone.alive)
            except TimeoutError:
                problem = f"not done after {self.options.timeout:g} s, twice"
            except AppTerminated:
                problem = "the app on the phone ended twice, as it does when a net does not fit into its memory"
            except Exception as error:
                if iphone.is_phone_error(error):
                    raise
                problem = f"the phone did not answer, twice: {iphone.summarize_error(error)}"
            finally:
                self._phone.tidy()
            self._phone.disconnect()
            if not self._phone.present():
                raise DeviceLostError(f"{self._phone.found.name} was disconnected", iphone.RECONNECT) from None
        raise MeasurementError(problem)

    def _conditions(self) -> dict[str, Any]:
        found = self._phone.found
        return {"chip": self._phone.model, "os": f"iOS {found.os_version} ({found.os_build_number})"}


def on_mac(options: Mapping[str, Any]) -> CoreMLBackend:
    """The backend ``coreml``.

    Raises:
        InputError: if this is no Mac, or for a wrong option.
    """
    iphone.check_mac("coreml")
    return CoreMLBackend(config.parse_config(dict(options), CoreMLConfig, source="latency"))


def on_phone(options: Mapping[str, Any]) -> IPhoneBackend:
    """The backend ``iphone``.

    Raises:
        InputError: for a wrong option, or if this is no Mac, has no Xcode, no signing team or no phone.
    """
    iphone.check_mac("iphone")
    around = {key: os.environ[name] for key, name in ENVIRONMENT.items() if os.environ.get(name)}
    wanted = config.parse_config({**around, **options}, IPhoneConfig, source="latency")
    if wanted.team is None and wanted.profile is None:
        remedy = "set ARCHSEARCH_SIGNING_TEAM to the team's identifier, from developer.apple.com/account"
        raise InputError("iphone", "the app for measuring needs a signing team", remedy)
    return IPhoneBackend(
        wanted, iphone.phone(wanted.phone, SigningCredentials(wanted.team, wanted.profile, wanted.bundle_id))
    )


def _feed(arch: Architecture, latent_size: int, context_tokens: int) -> ModelInputs:
    """What a net's package takes."""
    from snapgen.coreml.layers import time_features

    inputs = sample_inputs(arch, latent_size, context_tokens)
    inputs["time_features"] = time_features(inputs.pop("timestep"), arch.time.frequencies)
    if not arch.has_cross_attention:
        del inputs["context"]
    return {name: tensor.numpy().astype(np.float16) for name, tensor in inputs.items()}


def _model(package: Path, compute_units: str, device: Device | None) -> Any:
    """A net, not loaded yet: coremltools' ``MLModelAsyncWrapper``, half of whose methods have no types."""
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
        raise MeasurementError("Core ML did not say how long it took")
    return nanoseconds / 1e9
