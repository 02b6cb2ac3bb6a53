"""Inventory of this machine and of what each command still needs: the content of ``archsearch doctor``."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from archsearch.machine import chip, installed as version
from snapgen.errors import InputError, first_line

PROJECT = "archsearch"
EXTRAS = ("postgresql", "dashboard", "coreai")
"""The optional dependencies that users install; the others are for those who develop archsearch."""

TOOLS: Mapping[str, tuple[str, str]] = {
    "chromium": ("tests of the reports in a browser", "install chromium, on Debian: apt-get install chromium"),
    "postgres": ("a PostgreSQL server of your own", "install PostgreSQL, on Debian: apt-get install postgresql"),
    "xcodebuild": ("latencies on an iPhone", "on a Mac install Xcode and open it once"),
    "devicectl": ("latencies on an iPhone", "on a Mac: sudo xcode-select -s /Applications/Xcode.app"),
}
"""External programs: what each is for, and how to get it."""

_NET = ("torch", "diffusers", "safetensors")
_COST = (*_NET, "fvcore")
_LATENCY = (*_COST, "coremltools", "onnx", "onnxruntime", "psutil", "scipy")
_QUALITY = (*_NET, "transformers", "scipy", "filelock", "pillow", "braceexpand")
_STUDY = ("optuna", "scipy", "psutil", "pillow")
_REPORT = ("pandas", "plotly", "jinja2")
_TRAIN = (*_QUALITY, *_COST, "accelerate", "tensorboard")
_DEVICES = ("coreml", "coreai", "iphone")

COMMANDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "search": ((*_STUDY, *_LATENCY, *_QUALITY, *_REPORT), ("postgresql", *_DEVICES)),
    "report": ((*_STUDY, *_REPORT), ("postgresql",)),
    "best": (_STUDY, ("postgresql",)),
    "audit": ((*_STUDY, *_QUALITY, *_REPORT), ("postgresql",)),
    "ablate": ((*_STUDY, *_LATENCY, *_QUALITY, *_REPORT), ("postgresql", *_DEVICES)),
    "evolve": ((*_STUDY, *_LATENCY, *_QUALITY, *_REPORT), ("postgresql", *_DEVICES)),
    "tabulate": ((*_STUDY, *_COST), ("postgresql",)),
    "replay": ((*_STUDY, "pandas"), ()),
    "analyze": ((*_STUDY, *_REPORT), ()),
    "cost": (_COST, ()),
    "score": ((*_LATENCY, *_QUALITY), _DEVICES),
    "space": (_COST, ()),
    "latency": (_LATENCY, _DEVICES),
    "serve-device": ((*_LATENCY, "optuna"), ("postgresql", *_DEVICES)),
    "train": (_TRAIN, ()),
    "compare-recipes": ((*_TRAIN, "pandas"), ()),
    "generate": (_QUALITY, ()),
    "export": ((*_QUALITY, "coremltools"), ()),
    "push": (_QUALITY, ()),
    "convert": (_NET, ()),
    "prune-decoder": (_QUALITY, ()),
    "train-autoencoder": (_QUALITY, ()),
    "doctor": ((), ()),
    "schema": ((), ()),
}
"""Each command's required packages, and the extras and latency devices that some of its options need, in the order in
which ``--help`` lists them: a search, single networks, trainings, trained networks, the rest.

The command line itself needs pydantic, PyYAML, typer and rich.
"""


@dataclass(frozen=True)
class Check:
    """Whether one thing is here: a package, a tool, a device, a latency backend, a command."""

    name: str
    ok: bool
    detail: str
    """A version, a path or a device's name; of what is missing, what it is needed for or what the problem is."""
    remedy: str = ""


@dataclass(frozen=True)
class Installation:
    """Everything that was looked at."""

    packages: tuple[Check, ...]
    """The required ones."""
    extras: tuple[Check, ...]
    tools: tuple[Check, ...]
    torch_devices: tuple[Check, ...]
    latency_backends: tuple[Check, ...]
    commands: tuple[Check, ...]

    @property
    def complete(self) -> bool:
        """Whether every required package is here."""
        return all(check.ok for check in self.packages)


def inspect_installation() -> Installation:
    """Look at this machine; nothing is changed, downloaded or measured."""
    packages, extras = tuple(_packages()), tuple(_extras())
    backends = tuple(_backends(complete=all(check.ok for check in packages)))
    return Installation(
        packages=packages,
        extras=extras,
        tools=tuple(_tools()),
        torch_devices=tuple(_torch_devices()),
        latency_backends=backends,
        commands=tuple(_commands(packages, extras, backends)),
    )


def _requirements(extra: str = "") -> list[Requirement]:
    """Requirements of the project's own metadata: those of an extra, or those of no extra."""
    found = [Requirement(line) for line in importlib.metadata.requires(PROJECT) or ()]
    of_none = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    if not extra:
        return of_none
    return [each for each in found if each not in of_none and each.marker and each.marker.evaluate({"extra": extra})]


def _packages() -> Iterator[Check]:
    here = version(PROJECT)
    if here is None:
        yield Check(PROJECT, False, "is not an installed package", "pip install -e . in its checkout")
        return
    yield Check(PROJECT, True, here)
    for requirement in _requirements():
        yield _package(requirement, f"pip install '{requirement.name}{requirement.specifier}'")


def _extras() -> Iterator[Check]:
    for extra in EXTRAS if version(PROJECT) else ():
        missing = [check for each in _requirements(extra) if not (check := _package(each, "")).ok]
        detail = "; ".join(f"{check.name} {check.detail}" for check in missing)
        installed = ", ".join(f"{each.name} {version(each.name)}" for each in _requirements(extra))
        remedy = f"pip install '{PROJECT}[{extra}]'"
        yield Check(extra, False, detail, remedy) if missing else Check(extra, True, installed)


def _package(requirement: Requirement, remedy: str) -> Check:
    name, found = requirement.name, version(requirement.name)
    if found is None:
        return Check(name, False, "is not installed", remedy)
    if not _meets(found, str(requirement.specifier)):
        return Check(name, False, f"is {found}, not {requirement.specifier}", remedy)
    return Check(name, True, found)


def _meets(found: str, condition: str) -> bool:
    """Whether a version meets a condition; pre-releases count, and so do local suffixes such as ``+cpu``."""
    return SpecifierSet(condition).contains(found, prereleases=True)


def _tools() -> Iterator[Check]:
    for name, (purpose, remedy) in TOOLS.items():
        path = _find_tool(name)
        yield Check(name, path is not None, path or f"is needed for {purpose}", "" if path else remedy)


def _find_tool(name: str) -> str | None:
    if name == "chromium":
        return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if name == "postgres":  # Debian leaves a server's programs off the path
        return shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))), None)
    if platform.system() != "Darwin" or shutil.which(name):
        return shutil.which(name)
    try:
        found = subprocess.run(["xcrun", "--find", name], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _torch_devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it is linked to
        yield Check("torch", False, first_line(error), "pip install torch")
        return
    yield Check("cpu", True, f"{torch.get_num_threads()} threads")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    yield Check("cuda", bool(names), names or "no CUDA device is seen", "" if names else "see pytorch.org/get-started")
    mps = torch.backends.mps.is_available()
    yield Check("mps", mps, "Apple's GPU" if mps else "needs a Mac with Apple silicon")


def _backends(*, complete: bool) -> Iterator[Check]:
    """Which latency devices can work here, in the words of the error that each would give."""
    if not complete:
        remedy = "install the missing packages first"
        yield from (Check(name, False, "was not looked at", remedy) for name in ("host", *_DEVICES, "predicted"))
        return
    from archsearch.latency import coreai, coreml, iphone
    from archsearch.predictor import profiles

    def find_phone() -> str:
        wanted = coreml.phone_config({}).phone
        iphone.find_tools()
        return str(iphone.find_phone(wanted).name)

    yield Check("host", True, f"ONNX Runtime on {chip()}")
    yield _tried("coreml", lambda: iphone.check_mac("coreml"))
    yield _tried("coreai", lambda: coreai.on_mac({}))
    yield _tried("iphone", find_phone)
    yield Check("predicted", True, ", ".join(f"predicted:{name}" for name in profiles.NAMES))


def _tried(name: str, attempt: Callable[[], object]) -> Check:
    """Whether a device works here, with the name that the attempt returns, if any, else with this machine's chip."""
    try:
        found = attempt()
        return Check(name, True, found if isinstance(found, str) else chip())
    except InputError as error:
        return Check(name, False, error.problem, error.remedy)


def _commands(packages: Sequence[Check], extras: Sequence[Check], backends: Sequence[Check]) -> Iterator[Check]:
    """Each command with the packages that it misses, or else with the options that do not work yet."""
    checks = {check.name: check for check in (*packages, *extras, *backends)}
    if not all(check.ok for check in packages if check.name == PROJECT):
        yield from (Check(name, True, "not checked") for name in COMMANDS)
        return
    for name, (required, optional) in COMMANDS.items():
        missing = [checks[package] for package in dict.fromkeys(required) if not checks[package].ok]
        if missing:
            detail = "; ".join(f"{check.name} {check.detail}" for check in missing)
            yield Check(name, False, detail, "; ".join(check.remedy for check in missing))
            continue
        absent = [each for each in optional if not checks[each].ok]
        without = f" without {', '.join(_OPTIONS[each] for each in absent)}" if absent else ""
        remedies = dict.fromkeys(checks[each].remedy for each in absent)
        yield Check(name, True, f"ready{without}", "; ".join(remedies))


_OPTIONS = {
    "postgresql": "storages of PostgreSQL",
    "coreai": "--device coreai",
    "coreml": "--device coreml",
    "iphone": "--device iphone",
}
