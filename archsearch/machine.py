"""Description of the current machine, stored with latencies, studies and reports."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("torch", "onnxruntime", "optuna", "diffusers", "transformers", "numpy")
"""Packages whose versions are recorded."""

JSON = str | int | float | dict[str, str] | None


def system_info() -> dict[str, JSON]:
    """Chip, cores, memory in GiB, operating system, training device and library versions, as JSON values."""
    import psutil

    return {
        "chip": chip(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": operating_system(),
        "device": training_device(),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := installed(name))},
    }


@functools.cache
def chip() -> str:
    """The processor's marketing name, or the CPU architecture where the system does not report a name."""
    name = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Linux":
            name = model_name(Path("/proc/cpuinfo").read_text(errors="replace"))
        elif platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return name or platform.processor() or platform.machine()


def model_name(cpuinfo: str) -> str:
    """The first processor's name in Linux's ``/proc/cpuinfo``; empty if absent, e.g. on some ARM kernels."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return " ".join(value.split())
    return ""


def cores() -> int:
    """Number of logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def operating_system() -> str:
    """Name, release and CPU architecture, e.g. ``Linux 6.18 x86_64``, ``macOS 26.1 arm64``."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    release = ".".join(platform.release().split("-")[0].split(".")[:2])
    return f"{platform.system()} {release} {platform.machine()}"


def training_device() -> str:
    """The torch device that training uses by default; for CUDA with the GPU's name."""
    import torch

    from snapgen import devices

    device = devices.default_device()
    return f"{device.type} ({torch.cuda.get_device_name()})" if device.type == "cuda" else device.type


def installed(package: str) -> str | None:
    """The version of an installed package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
