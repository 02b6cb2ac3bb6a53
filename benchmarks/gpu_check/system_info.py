"""Description of the machine as JSON: ``python -m benchmarks.gpu_check.system_info``.

The check runs it in a separate process, because a broken driver may crash the process that queries it.
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
"""Dense bfloat16 FLOP/s with float32 accumulation, from NVIDIA's data sheets; H100 and A100 as SXM modules."""


def describe() -> dict[str, str]:
    """Device, driver, library versions and date; ``cuda`` is present only if torch sees a CUDA device."""
    info = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "libraries": ", ".join(f"{name} {version(name) or 'is not installed'}" for name in LIBRARIES),
    }
    return {**cuda(), **info}


def cuda() -> dict[str, str]:
    """Description of the GPU by torch and nvidia-smi; empty without torch or CUDA."""
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
    """Version of the NVIDIA driver, or why it is unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi did not answer"


def version(package: str) -> str | None:
    """Version of an installed package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def flops_of(device: str) -> float | None:
    """Dense bfloat16 peak in FLOP/s of a device, by its name; None if it is not in `PEAKS`."""
    words = device.replace("-", " ").split()
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def query(environment: Mapping[str, str]) -> dict[str, str]:
    """Run `describe` in a separate process with the given environment variables.

    Raises:
        RuntimeError: if the process fails; the message is the last line of its output.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_check.system_info"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    info: dict[str, str] = json.loads(lines[-1])
    return info


if __name__ == "__main__":
    print(json.dumps(describe()))
