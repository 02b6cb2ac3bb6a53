"""Tensors that are dear to compute, kept on disk by what they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from snapgen.errors import InputError

JSON: TypeAlias = "str | int | float | bool | list[JSON] | tuple[JSON, ...] | Mapping[str, JSON] | None"

_log = logging.getLogger(__name__)
# A file set aside by a process that was killed; no writing takes this long.
_STALE_SECONDS = 24 * 3600.0


def cache_dir() -> Path:
    """Where everything is kept: ``$ARCHSEARCH_CACHE``, or ``~/.cache/archsearch``."""
    named = os.environ.get("ARCHSEARCH_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "archsearch"


def cached_tensors(
    kind: str, key: Mapping[str, JSON], compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """``compute()``, or what it gave when last called with an equal key.

    Args:
        kind: what is kept, a folder's name: ``text``, ``latents``.
        key: everything that the tensors depend on; it is stored with them.
        compute: gives the tensors; called only when no whole file is there.

    Returns:
        The tensors, on the CPU and memory-mapped: a file larger than memory is read where it is used. One that was cut
        short is computed again. Where nothing can be written (a full disk, a read-only home) the tensors are returned
        all the same, in memory, with a warning.

    Raises:
        InputError: if ``$ARCHSEARCH_CACHE`` names something that is not a folder.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path = cache_dir() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    found = _read(path, text)
    if found is not None:
        return found
    _refuse_file(cache_dir())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    try:
        _write(path, tensors, text)
        return _read(path, text) or tensors
    except (OSError, SafetensorError) as error:
        _warn_once(str(cache_dir()), str(error))
        return tensors


def _read(path: Path, text: str) -> dict[str, torch.Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == text:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        problem = "holds something else"
    except (OSError, SafetensorError):
        problem = "is damaged"
    _log.warning("%s %s; computing it again", path, problem)
    return None


def _write(path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    # Several workers may compute the same thing at once: each has a file of its own, and the last rename wins.
    part = path.with_suffix(f".{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        # Two names for one storage cannot be saved; a copy is cheap beside what is cached here.
        shared = len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors)
        save_file({n: t.clone() for n, t in tensors.items()} if shared else tensors, part, metadata={"key": text})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _remove_stale(parent: Path) -> None:
    for part in parent.glob("*.part"):
        try:
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()
        except OSError:  # another worker was faster
            continue


def _refuse_file(root: Path) -> None:
    if os.environ.get("ARCHSEARCH_CACHE") and root.exists() and not root.is_dir():
        raise InputError(root, "is not a folder", "set ARCHSEARCH_CACHE to a folder", place="ARCHSEARCH_CACHE")


@functools.cache
def _warn_once(root: str, problem: str) -> None:
    _log.warning("nothing can be kept in %s (%s); set ARCHSEARCH_CACHE to a folder with space", root, problem)
