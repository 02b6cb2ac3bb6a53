"""A checkpoint: everything that a training goes on from, in one safetensors file that is whole or not there."""

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

from snapgen.cache import JSON
from snapgen.errors import InputError
from snapgen.files import aside


def save(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, JSON]) -> None:
    """Write a checkpoint; the one that was there stays until the new one is on the disk.

    Args:
        parts: tensors by name, of each part by its name (``net``, ``average``, ``optimizer``, …).
        facts: whatever else is to be known: stage, step.

    Raises:
        InputError: if it cannot be written (a full disk); the one that was there is left as it is.
    """
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as file:
            save_file(tensors, file, metadata={"facts": json.dumps(facts, allow_nan=False)})
            with file.open("rb") as written:
                os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        remedy = "make room; the same command goes on from the last checkpoint"
        raise InputError(path, f"cannot be written ({problem})", remedy) from None


def facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its tensors.

    Raises:
        InputError: if it is damaged.
    """
    return _read(path, tensors=False)[1]


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the facts that `save` was given; tensors on the CPU.

    Raises:
        InputError: if it is damaged.
    """
    return _read(path, tensors=True)


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
            for key in file.keys() if tensors else ():
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key).clone()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        problem = f"is damaged or no checkpoint ({str(error).splitlines()[0][:100] if str(error) else 'empty'})"
        raise InputError(path, problem, "restore it, or remove it to begin its stage again") from None
    return parts, found


def random_state() -> dict[str, Tensor]:
    """The states of torch's own generators, for whatever draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
