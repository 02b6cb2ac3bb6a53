"""A checkpoint: everything that a training goes on from, in one safetensors file that is whole or not there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write
from snapgen.io.cache import JSON

SECONDS_BETWEEN = 30.0
"""Between checkpoints of a command."""

StepCallback = Callable[[int, int, Mapping[str, Tensor]], None]
"""Told the step, the steps in all and the losses of the step; to read one is to wait for the device."""


def save_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, JSON]) -> None:
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
        with atomic_write(path) as file:
            save_file(tensors, file, metadata={"facts": json.dumps(facts, allow_nan=False)})
            with file.open("rb") as written:
                os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        remedy = "make room; the same command goes on from the last checkpoint"
        raise InputError(path, f"cannot be written ({problem})", remedy) from None


def read_metadata(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its tensors.

    Raises:
        InputError: if it is damaged.
    """
    return _read(path, tensors=False)[1]


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the facts that `save_checkpoint` was given; tensors on the CPU.

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


def rng_state() -> dict[str, Tensor]:
    """The states of torch's own generators, for whatever draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Resumable(Protocol):
    """A training that goes on where another one of the same arguments was."""

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
        """Parts and facts, as `save_checkpoint` takes them."""
        ...

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        """Go on from these."""
        ...


class CheckpointSession:
    """The checkpoint of a command's training, which was asked for in these words."""

    def __init__(self, path: Path, asked: Mapping[str, JSON]) -> None:
        """Reads what the checkpoint says of its training, if there is one.

        Raises:
            InputError: if it is damaged, or of a training that was asked for in other words.
        """
        self.path, self._asked = path, asked
        found = read_metadata(path) if path.is_file() else {}
        self.steps: int | None = found.get("steps")
        """Of the training in all; None: there is no checkpoint."""
        self.seconds: float = found.get("seconds", 0.0)
        """Processor time of the training so far."""
        other = next((key for key in asked if found and found.get("asked", {}).get(key) != asked[key]), None)
        if other:
            problem = f"is of a training with another {other}"
            raise InputError(path, problem, "give the options of that one, name another --out, or remove the file")

    def restore(self, run: Resumable) -> None:
        """Let a training go on from the checkpoint, if there is one."""
        if self.steps is not None:
            run.load(*load_checkpoint(self.path))

    def keeping(self, run: Resumable, progress: StepCallback | None) -> StepCallback:
        """The same progress, which also writes the checkpoint now and then."""
        spent, written = time.process_time(), time.monotonic()

        def keep(step: int, steps: int, losses: Mapping[str, Tensor]) -> None:
            nonlocal spent, written
            self.seconds, spent = self.seconds + time.process_time() - spent, time.process_time()
            if time.monotonic() - written >= SECONDS_BETWEEN:
                parts, found = run.state()
                told: dict[str, JSON] = {"asked": self._asked, "steps": steps, "seconds": self.seconds}
                save_checkpoint(self.path, parts, {**found, **told})
                written = time.monotonic()
            if progress:
                progress(step, steps, losses)

        return keep
