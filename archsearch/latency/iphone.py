"""Apple devices: checks of this Mac, and the connection to an iPhone.

The phone runs an app provided by coremltools, which Xcode builds, signs and installs on first use. This code has not
been run on a Mac or a phone yet; it is tested against stand-ins for coremltools' interface.
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
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from archsearch.latency.base import DeviceLostError
from snapgen.coreml.package import quiet
from snapgen.errors import InputError

if TYPE_CHECKING:
    from coremltools.models.ml_program.experimental.remote_device import Device

T = TypeVar("T")

MIN_MACOS = 15
MIN_IOS = 18
"""Minimum versions: the exported packages target iOS 18, which corresponds to macOS 15."""

BUILD_SECONDS = 900.0
"""Time limit for building and installing the app."""

START_SECONDS = 3.0
"""Wait after starting the app, to detect that a locked phone refused to start it."""

POLL_SECONDS = 0.5
"""Interval at which coremltools polls the phone."""

WATCH_SECONDS = 1.0
"""Interval of the checks whether the app is still running."""

WITHOUT_MAC = "run archsearch serve-device on a Mac for the study's storage, or use predicted:iphone-15-pro"
RECONNECT = "connect the phone by cable, unlock it, let it trust this Mac, then run the same command again"


def check_mac(device: str, minimum: int = MIN_MACOS) -> None:
    """Check that this is a Mac that can run exported packages.

    Raises:
        InputError: if it is not.
    """
    if platform.system() != "Darwin":
        raise InputError("latency", f"{device} needs a Mac, but this is {platform.system()}", WITHOUT_MAC)
    version = platform.mac_ver()[0]
    if _major(version) < minimum:
        raise InputError("latency", f"{device} needs macOS {minimum}, but this is {version}", "update macOS")


def thermal_state() -> str | None:
    """Thermal state of a Mac: ``nominal``, or the throttling reported by ``pmset``; None if it reports nothing."""
    try:
        command = ["/usr/bin/pmset", "-g", "therm"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in output.splitlines())}
    unthrottled = {"CPU_Scheduler_Limit": "100", "CPU_Speed_Limit": "100", "Thermal Warning Level": "0"}
    throttled = [
        f"{name} {values[name]}" for name in unthrottled if values.get(name, unthrottled[name]) != unthrottled[name]
    ]
    return ", ".join(throttled) or ("nominal" if output.strip() else None)


class AsyncRunner:
    """Runs coroutines in an event loop on its own thread, because calls to Core ML or a phone may never return."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def call(self, work: Coroutine[Any, Any, T], seconds: float, *, alive: Callable[[], bool] = lambda: True) -> T:
        """Run a coroutine and return its result.

        Args:
            work: the coroutine.
            seconds: timeout.
            alive: checked every `WATCH_SECONDS`; False if the app on the phone has ended, which coremltools overlooks.

        Raises:
            TimeoutError: if it takes longer than ``seconds``.
            ConnectionError: if ``alive`` returns False before the result arrives.
        """
        deadline = time.monotonic() + seconds
        with quiet():
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            try:
                while not concurrent.futures.wait([future], min(WATCH_SECONDS, deadline - time.monotonic())).done:
                    if not alive():
                        raise ConnectionError("the app on the phone ended, probably for lack of memory")
                    if time.monotonic() >= deadline:
                        raise TimeoutError
                return future.result()
            finally:
                future.cancel()

    def stop(self) -> None:
        """Stop the thread once it is idle."""
        self._loop.call_soon_threadsafe(self._loop.stop)


class Phone:
    """An iPhone and the connection to the app on it.

    Args:
        name: name or identifier of the phone; None: the only connected one.
        team, profile, bundle_id: what signs the app: a team, or a provisioning profile with its bundle id.
    """

    def __init__(self, name: str | None, team: str | None, profile: str | None, bundle_id: str | None) -> None:
        self._name, self._signing = name, (team, profile, bundle_id)
        self.device = find_phone(name)
        self.model = marketing_name(self.device.identifier) or self.device.name
        # Always the same folder, so that a second connection does not rebuild the app.
        self._folder = tempfile.TemporaryDirectory(prefix="archsearch-phone-", ignore_cleanup_errors=True)
        self._session: tuple[Device, AsyncRunner] | None = None
        atexit.register(self.disconnect)

    def connect(self) -> tuple[Device, AsyncRunner]:
        """Start the app unless it runs; return the device, with the runner of calls to it.

        Raises:
            DeviceLostError: if the phone is not connected, or the app cannot be started.
        """
        if self._session and self._session[0].session.is_alive():
            return self._session
        self.disconnect()
        try:
            device, loop = find_phone(self._name), AsyncRunner()
        except InputError as error:
            raise DeviceLostError(error.problem, error.remedy) from None
        try:
            self._session = loop.call(self._install(device), BUILD_SECONDS), loop
        except Exception as error:
            loop.stop()
            problem = f"the app for measuring could not be installed on {device.name}: {summarize_error(error)}"
            remedy = "unlock the phone, check the team's account in Xcode's settings, and try again"
            raise DeviceLostError(problem, remedy) from None
        time.sleep(START_SECONDS)
        if not self._session[0].session.is_alive():
            self.disconnect()
            raise DeviceLostError(f"the app for measuring does not start on {device.name}", RECONNECT)
        return self._session

    async def _install(self, device: Device) -> Device:
        from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials

        team, profile, bundle_id = self._signing
        credentials = AppSigningCredentials(
            development_team=team, provisioning_profile_uuid=profile, bundle_identifier=bundle_id
        )
        prepared: Device = await device.prepare_for_model_debugging(
            credentials=credentials, working_directory=Path(self._folder.name)
        )
        return prepared

    def present(self) -> bool:
        """Whether the phone is connected."""
        try:
            find_phone(self._name)
        except InputError:
            return False
        return True

    def disconnect(self) -> None:
        """Stop the app."""
        if self._session:
            device, loop = self._session
            self._session = None
            with contextlib.suppress(Exception):  # it may have stopped already
                device.session.stop()
            loop.stop()


@functools.cache
def phone(name: str | None, team: str | None, profile: str | None, bundle_id: str | None) -> Phone:
    """The only `Phone` object of a phone in this process: a second app would terminate the first.

    Raises:
        InputError: if the phone is not connected, or Xcode is not installed.
    """
    find_tools()
    return Phone(name, team, profile, bundle_id)


def find_phone(name: str | None) -> Device:
    """Find the connected phone with that name or identifier; without a name, the only connected one.

    Raises:
        InputError: if there is none, there are several, or the phone does not meet the requirements.
    """
    from coremltools.models.ml_program.experimental.remote_device import Device, DeviceType

    try:
        with quiet():
            devices = Device.get_connected_devices(DeviceType.IPHONE)
    except Exception as error:  # coremltools' private class, ValueError, and errors from parsing invalid output
        raise InputError(
            "iphone", f"phones cannot be listed: {summarize_error(error)}", "run: xcrun devicectl list devices"
        ) from None
    matching = [device for device in devices if name in (None, device.name, device.identifier, device.udid)]
    if not matching:
        others = ", ".join(device.name for device in devices)
        problem = f"no phone called {name!r} is connected, only {others}" if others else "no phone is connected"
        raise InputError("iphone", problem, RECONNECT)
    if len(matching) > 1:
        names = ", ".join(device.name for device in matching)
        raise InputError("iphone", f"several phones are connected: {names}", "name one: phone, or ARCHSEARCH_PHONE")
    (device,) = matching
    if _major(device.os_version) < MIN_IOS:
        raise InputError("iphone", f"{device.name} runs iOS {device.os_version}", f"update it to iOS {MIN_IOS}")
    if device.developer_mode_state == "disabled":
        remedy = "switch it on in Settings, Privacy & Security"
        raise InputError("iphone", f"{device.name} is not in developer mode", remedy)
    return device


@contextlib.contextmanager
def long_timeout(seconds: float) -> Iterator[None]:
    """Extend the timeout of calls to the phone.

    coremltools polls for an answer twenty times, which is too short for the first load of a large net, and has no
    setting for it: this is the only private part of coremltools that is used.
    """
    from coremltools.models.ml_program.experimental import remote_device

    original = remote_device._DeviceCtlRemoteService
    attempts = max(20, round(seconds / POLL_SECONDS))
    remote_device._DeviceCtlRemoteService = functools.partial(original, max_attempts=attempts)
    try:
        yield
    finally:
        remote_device._DeviceCtlRemoteService = original


def find_tools() -> None:
    """Check that Xcode is installed, and add its tools to PATH: coremltools expects devicectl there."""
    remedy = "install Xcode, open it once, then: sudo xcode-select -s /Applications/Xcode.app"
    for tool in ("xcodebuild", "devicectl"):
        if shutil.which(tool):
            continue
        try:
            result = subprocess.run(["xcrun", "--find", tool], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            raise InputError("iphone", f"needs Xcode: {tool} was not found", remedy) from None
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(result.stdout.strip()).parent}"


def marketing_name(identifier: str) -> str | None:
    """Model of a phone, e.g. ``iPhone 15 Pro (iPhone16,1)``, which coremltools does not provide; None if unknown."""
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
    """One-line summary of an error; for a failed build its first compiler error, which coremltools omits."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    text = getattr(error, "message", None) or str(error)
    if isinstance(output := getattr(error.__context__, "output", None), bytes):
        text = (re.findall(rb"error: *(.*)", output) or [text])[0]
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return " ".join(text.split())[:200] or type(error).__name__
