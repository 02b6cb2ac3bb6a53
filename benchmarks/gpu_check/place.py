"""What the check runs on, as a process of its own finds it: ``python -m benchmarks.gpu_check.place``, printed as JSON.

A driver that is broken may take the process with it that asks.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping

LIBRARIES = ("torch", "triton", "diffusers", "transformers", "accelerate", "optuna", "fvcore", "onnxruntime", "numpy")
PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}
"""Dense bfloat16 FLOP/s with float32 sums, from NVIDIA's data sheets; of H100 and A100 the SXM modules."""


def describe() -> dict[str, str]:
    """Device, driver, versions and date; ``cuda`` is there only where torch sees a CUDA device."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "libraries": ", ".join(f"{name} {version(name) or 'is not installed'}" for name in LIBRARIES),
    }
    return {**cuda(), **found}


def cuda() -> dict[str, str]:
    """The GPU, as torch and the driver's own tool see it; empty without torch or without CUDA."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "cuda": properties.name,
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors",
        "driver": driver(),
        "CUDA of torch": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
    }


def driver() -> str:
    """The version of NVIDIA's driver, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi did not answer"


def version(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def flops_of(device: str) -> float | None:
    """The dense bfloat16 peak of a device by its name, FLOP/s; None where it is not known here."""
    words = device.replace("-", " ").split()
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def asked(environment: Mapping[str, str]) -> dict[str, str]:
    """What `describe` finds in a process of its own, with the packages that the environment names.

    Raises:
        RuntimeError: if that process fails; the message is its last line.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_check.place"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    found: dict[str, str] = json.loads(lines[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(describe()))
