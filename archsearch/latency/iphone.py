"""Apple's devices: whether this is a Mac that can measure, and a phone that is connected to it.

The phone runs an app of coremltools', which Xcode builds, signs and installs when it is first needed. None of this has
been run on a Mac or a phone yet; it is tested against stand-ins of coremltools' own interface.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from archsearch.latency.base import DeviceLostError
from snapgen.coreml.package import quiet
from snapgen.errors import InputError

if TYPE_CHECKING:
    from coremltools.models.ml_program.experimental.remote_device import Device

T = TypeVar("T")

OLDEST_MACOS = 15
OLDEST_IOS = 18
"""The packages are of iOS 18, which is macOS 15."""

BUILD_SECONDS = 900.0
START_SECONDS = 3.0
"""For an app that a locked phone refuses to start to be seen to have ended."""
WATCH_SECONDS = 1.0
POLL_SECONDS = 0.5
"""Between coremltools' questions to the phone."""
WITHOUT_MAC = "run archsearch device on a Mac for the study's storage, or use predicted:iphone-15-pro"
RECONNECT = "connect the phone by cable, unlock it, let it trust this Mac, then run the same command again"


class AppTerminated(Exception):
    """The app on the phone is no longer there."""


def check_mac(device: str) -> None:
    """Raise InputError unless this is a Mac that runs our packages."""
    if platform.system() != "Darwin":
        raise InputError("latency", f"{device} needs a Mac, and this is {platform.system()}", WITHOUT_MAC)
    version = platform.mac_ver()[0]
    if _major(version) < OLDEST_MACOS:
        raise InputError("latency", f"{device} needs macOS {OLDEST_MACOS}, and this is {version}", "update macOS")


def thermal_state() -> str | None:
    """``nominal``, or what ``pmset`` says of a Mac's throttling; None if it says nothing."""
    try:
        command = ["/usr/bin/pmset", "-g", "therm"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in found.splitlines())}
    full = {"CPU_Scheduler_Limit": "100", "CPU_Speed_Limit": "100", "Thermal Warning Level": "0"}
    throttled = [f"{name} {values[name]}" for name in full if values.get(name, full[name]) != full[name]]
    if throttled:
        return ", ".join(throttled)
    return "nominal" if found.strip() else None


class AsyncRunner:
    """An event loop in a thread of its own, for calls that may never come back; one of them costs a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def call(self, work: Coroutine[Any, Any, T], seconds: float, *, alive: Callable[[], bool] = lambda: True) -> T:
        """What the work gives.

        Raises:
            TimeoutError: if it takes longer.
            Ended: if meanwhile it turns out not to be alive.
        """
        until = time.monotonic() + seconds
        with quiet():
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            try:
                while not _done(future, min(WATCH_SECONDS, until - time.monotonic())):
                    if not alive():
                        raise AppTerminated
                    if time.monotonic() >= until:
                        raise TimeoutError
                return future.result()
            finally:
                future.cancel()

    def stop(self) -> None:
        """End the thread, as soon as it is free."""
        self._loop.call_soon_threadsafe(self._loop.stop)


def _done(future: concurrent.futures.Future[Any], seconds: float) -> bool:
    return bool(concurrent.futures.wait([future], timeout=max(0.0, seconds)).done)


class SigningCredentials(NamedTuple):
    """Whose app the phone is asked to run; a team, or a provisioning profile with the bundle id that it is for."""

    team: str | None
    profile: str | None
    bundle_id: str | None


class Phone:
    """A phone, and the app on it while it is connected."""

    def __init__(self, wanted: str | None, signing: SigningCredentials) -> None:
        self._wanted, self._signing = wanted, signing
        self.found = find_phone(wanted)
        self.model = marketing_name(self.found.identifier) or self.found.name
        self._folder = Path(tempfile.mkdtemp(prefix="archsearch-phone-"))
        self._session: tuple[Device, AsyncRunner] | None = None
        atexit.register(self.close)

    def connect(self) -> tuple[Device, AsyncRunner]:
        """The phone with the app running on it, and the loop that talks to it.

        Raises:
            DeviceLost: if there is no phone, or no app on it.
        """
        if self._session and self.alive():
            return self._session
        self.disconnect()
        try:
            device = find_phone(self._wanted)
        except InputError as error:
            raise DeviceLostError(error.problem, error.remedy) from None
        loop = AsyncRunner()
        try:
            prepared = loop.call(self._prepared(device), BUILD_SECONDS)
        except Exception as error:
            loop.stop()
            # A build that failed may have left an app, which coremltools would take for a good one.
            shutil.rmtree(self._folder, ignore_errors=True)
            problem = f"the app for measuring could not be put on {device.name}: {summarize_error(error)}"
            raise DeviceLostError(
                problem, "unlock the phone, see Xcode's settings for the team's account, and try again"
            ) from None
        self._session = prepared, loop
        time.sleep(START_SECONDS)
        if not self.alive():
            self.disconnect()
            raise DeviceLostError(f"the app for measuring does not start on {device.name}", RECONNECT)
        return self._session

    async def _prepared(self, device: Device) -> Device:
        from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials

        self._folder.mkdir(exist_ok=True)
        credentials = AppSigningCredentials(
            development_team=self._signing.team,
            provisioning_profile_uuid=self._signing.profile,
            bundle_identifier=self._signing.bundle_id,
        )
        # In one folder, so that a second connection does not build it again.
        prepared: Device = await device.prepare_for_model_debugging(
            credentials=credentials, working_directory=self._folder
        )
        return prepared

    def alive(self) -> bool:
        """Whether the app is running, as far as the Mac knows."""
        return self._session is not None and self._session[0].session.is_alive()

    def present(self) -> bool:
        """Whether the phone is connected."""
        try:
            find_phone(self._wanted)
        except InputError:
            return False
        return True

    def disconnect(self) -> None:
        """End the app."""
        if self._session:
            device, loop = self._session
            self._session = None
            with contextlib.suppress(Exception):  # it may have ended itself
                device.session.stop()
            loop.stop()

    def close(self) -> None:
        """End the app, and remove all files of it here."""
        self.disconnect()
        shutil.rmtree(self._folder, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what passed between the phone and this Mac."""
        if self._session:
            for part in Path(self._session[0].session.working_directory).glob("*/re*s"):
                if part.name in ("requests", "responses"):
                    shutil.rmtree(part, ignore_errors=True)


@functools.cache
def phone(wanted: str | None, signing: SigningCredentials) -> Phone:
    """The one object of a phone in this process: two apps on it would end each other.

    Raises:
        InputError: if there is no such phone, or no Xcode.
    """
    _find_tools()
    return Phone(wanted, signing)


def find_phone(wanted: str | None) -> Device:
    """The connected phone of that name or identifier; the only one, if no name is given.

    Raises:
        InputError: if there is none, or it is not one to measure on.
    """
    from coremltools.models.ml_program.experimental.remote_device import Device, DeviceType

    try:
        with quiet():
            devices = Device.get_connected_devices(DeviceType.IPHONE)
    except Exception as error:  # coremltools' own, which has no public name, ValueError, and what a bad answer makes
        raise InputError(
            "iphone", f"phones cannot be listed: {summarize_error(error)}", "run: xcrun devicectl list devices"
        ) from None
    named = [device for device in devices if wanted in (None, device.name, device.identifier, device.udid)]
    if not named:
        others = ", ".join(device.name for device in devices)
        problem = f"no phone called {wanted!r} is connected, only {others}" if others else "no phone is connected"
        raise InputError("iphone", problem, RECONNECT)
    if len(named) > 1:
        names = ", ".join(device.name for device in named)
        raise InputError("iphone", f"several phones are connected: {names}", "name one: phone, or ARCHSEARCH_PHONE")
    (device,) = named
    if _major(device.os_version) < OLDEST_IOS:
        raise InputError("iphone", f"{device.name} runs iOS {device.os_version}", f"update it to iOS {OLDEST_IOS}")
    if device.developer_mode_state == "disabled":
        remedy = "switch it on in Settings, Privacy & Security"
        raise InputError("iphone", f"{device.name} is not in developer mode", remedy)
    return device


@contextlib.contextmanager
def long_timeout(seconds: float) -> Iterator[None]:
    """Let a call to the phone take so long.

    coremltools asks twenty times for an answer, which a large net's first load outlasts; it has no
    setting for it. `AsyncRunner.call` sees sooner if the phone is gone.
    """
    from coremltools.models.ml_program.experimental import remote_device

    own = remote_device._DeviceCtlRemoteService
    attempts = max(20, round(seconds / POLL_SECONDS))
    remote_device._DeviceCtlRemoteService = functools.partial(own, max_attempts=attempts)
    try:
        yield
    finally:
        remote_device._DeviceCtlRemoteService = own


def detach(model: Any) -> None:
    """Keep coremltools from calling, whenever Python drops a net, a phone that is gone."""
    service = getattr(model, "_remote_service", None)
    if service is not None:
        service._state = service.State.Unloaded


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Remove what is left in it: coremltools leaves each prediction's input behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="archsearch-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def is_phone_error(error: BaseException) -> bool:
    """Whether an error is the phone's own answer, such as that a model does not compile, not a connection's failure."""
    from coremltools.models.ml_program.experimental import remote_device

    if not isinstance(error, remote_device._DeviceCtlError):
        return True  # made on this Mac, before or after anything went to the phone
    # The tool's own failures come with its standard error, in bytes.
    return isinstance(error.message, str) and error.error_code is not None


def _find_tools() -> None:
    """See that Xcode is there; coremltools calls devicectl by its name, and only xcrun knows where it is."""
    remedy = "install Xcode, open it once, then: sudo xcode-select -s /Applications/Xcode.app"
    for tool in ("xcodebuild", "devicectl"):
        if shutil.which(tool):
            continue
        try:
            found = subprocess.run(["xcrun", "--find", tool], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            raise InputError("iphone", f"needs Xcode: there is no {tool}", remedy) from None
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(found.stdout.strip()).parent}"


def marketing_name(identifier: str) -> str | None:
    """``iPhone 15 Pro (iPhone16,1)``, which coremltools does not keep."""
    with tempfile.TemporaryDirectory(prefix="archsearch-") as folder:
        path = Path(folder) / "devices.json"
        try:
            command = ["xcrun", "devicectl", "list", "devices", "--json-output", str(path)]
            subprocess.run(command, capture_output=True, timeout=60, check=True)
            devices = json.loads(path.read_text())["result"]["devices"]
            hardware = next(device["hardwareProperties"] for device in devices if device["identifier"] == identifier)
            return f"{hardware['marketingName']} ({hardware['productType']})"
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, StopIteration):
            return None


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def summarize_error(error: BaseException) -> str:
    """An error in a line; of a build, its first complaint, which coremltools drops."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    output = getattr(error.__context__, "output", None)
    if isinstance(output, bytes):
        complaints = [line for line in output.decode(errors="replace").splitlines() if "error:" in line]
        if complaints:
            return complaints[0].partition("error:")[2].strip()[:200]
    message = getattr(error, "message", None)
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
