"""Disk cache of tensors that are expensive to compute, keyed by everything that they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from snapgen import files
from snapgen.errors import InputError
from snapgen.io.atomic import atomic_write, remove_stale

JSON: TypeAlias = "str | int | float | bool | list[JSON] | tuple[JSON, ...] | Mapping[str, JSON] | None"

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The cache folder: ``$ARCHSEARCH_CACHE``, or ``~/.cache/archsearch``."""
    override = os.environ.get("ARCHSEARCH_CACHE")
    return Path(override).expanduser() if override else Path.home() / ".cache" / "archsearch"


def cached_tensors(
    kind: str, key: Mapping[str, JSON], compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the tensors of ``compute()``, from the cache if they were computed before with an equal key.

    Args:
        kind: category of the tensors, used as a folder name: ``text``, ``latents``.
        key: everything that the tensors depend on; stored with them.
        compute: computes the tensors; called only if the cache has no complete file for the key.

    Returns:
        The tensors on the CPU, memory-mapped, so that a file larger than memory can be used. A file whose checksum is
        not that of its tensors is computed again. If the cache cannot be written (full disk, read-only home), the
        tensors are returned in memory, with a warning.

    Raises:
        InputError: if ``$ARCHSEARCH_CACHE`` names something that is not a folder.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path = cache_dir() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    cached = _read(path, text)
    if cached is not None:
        return cached
    root = cache_dir()
    if os.environ.get("ARCHSEARCH_CACHE") and root.exists() and not root.is_dir():
        raise InputError(root, "is not a folder", "set ARCHSEARCH_CACHE to a folder", place="ARCHSEARCH_CACHE")
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
        files.check_header(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("key") == text and metadata.get("crc32") == checksum(tensors):
            return tensors
        problem = (
            "is damaged, or was written by an earlier version" if metadata.get("key") == text else "has another key"
        )
    except Exception:  # safetensors raises anything on a damaged header
        problem = "is damaged"
    _log.warning("%s %s; computing it again", path, problem)
    return None


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of names, types, shapes and values, at 4 GB/s; it finds damages, and is no protection from forgery."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _write(path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, "*.part")
    # safetensors refuses tensors that share storage; copying them is cheap compared to computing them.
    shared = len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors)
    metadata = {"key": text, "crc32": checksum(tensors)}
    with atomic_write(path) as temporary:  # several workers may compute the same tensors at once: the last one wins
        save_file({n: t.clone() for n, t in tensors.items()} if shared else tensors, temporary, metadata=metadata)


@functools.cache
def _warn_once(root: str, problem: str) -> None:
    _log.warning("cannot write to the cache %s (%s); set ARCHSEARCH_CACHE to a folder with free space", root, problem)
