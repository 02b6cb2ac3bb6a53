"""Training checkpoints: everything needed to resume, in one safetensors file that is written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snapgen import files
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write, write_errors
from snapgen.io.cache import JSON


def save_checkpoint(path: Path, components: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, JSON]) -> None:
    """Write a checkpoint; it replaces the previous one only once it is complete on disk.

    Args:
        path: the checkpoint file.
        components: tensors by name, for each component (``net``, ``average``, ``optimizer``, …).
        metadata: everything else that is needed to resume, e.g. stage and step.

    Raises:
        InputError: if the file cannot be written (full disk); the previous checkpoint is kept.
    """
    tensors = {
        f"{component}/{name}": tensor.detach().cpu().contiguous()
        for component, state in components.items()
        for name, tensor in state.items()
    }
    with write_errors(path, "make room on the disk; the same command resumes from the last checkpoint"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            save_file(tensors, file, metadata={"facts": json.dumps(metadata, allow_nan=False)})
            with file.open("rb") as written:
                os.fsync(written.fileno())


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint, without its tensors.

    Raises:
        InputError: if the checkpoint is damaged.
    """
    return _read(path, tensors=False)[1]


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the components (tensors on the CPU) and the metadata that `save_checkpoint` wrote.

    Raises:
        InputError: if the checkpoint is damaged.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    components: dict[str, dict[str, Tensor]] = {}
    try:
        files.check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            for key in file.keys() if tensors else ():
                component, _, name = key.partition("/")
                components.setdefault(component, {})[name] = file.get_tensor(key).clone()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        problem = f"is damaged or not a checkpoint ({str(error).splitlines()[0][:100] if str(error) else 'empty'})"
        raise InputError(path, problem, "restore it, or delete it to start the stage again") from None
    return components, metadata


def rng_state() -> dict[str, Tensor]:
    """States of torch's global random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restore the states returned by `rng_state`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
