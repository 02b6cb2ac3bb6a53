"""Configuration and weights of diffusers models, from a folder or the hub: safetensors in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from snapgen import config
from snapgen.errors import InputError, first_line
from snapgen.io import hub

WEIGHTS_NAME = "diffusion_pytorch_model"
RESTORE = "restore it from its source"
SCHEDULER = "scheduler/scheduler_config.json"
"""Configuration of the scheduler within a pipeline's folder."""
MODEL_FILES = (
    "config.json",
    f"{WEIGHTS_NAME}.safetensors",
    f"{WEIGHTS_NAME}.safetensors.index.json",
    f"{WEIGHTS_NAME}-*-of-*.safetensors",
)
"""Glob patterns of the files that diffusers writes for a model."""


class LazyWeights(Mapping[str, Tensor]):
    """Tensors by name, each read from disk on access.

    Args:
        files: the safetensors files that hold them.

    Raises:
        InputError: if a file is missing, damaged or not in safetensors format.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                handle: Any = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(file, error) from None
            self._files.update(dict.fromkeys(handle.keys(), (file, handle)))

    def __getitem__(self, name: str) -> Tensor:
        file, handle = self._files[name]
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_pretrained(folder: Path) -> tuple[dict[str, Any], LazyWeights]:
    """Read the configuration and the weights of a U-Net that diffusers' ``save_pretrained`` wrote.

    Args:
        folder: the U-Net's folder, or a pipeline's folder, of which ``unet`` is read.

    Raises:
        InputError: if a file is missing or damaged.
    """
    return read_component(folder, "unet")[1:]


def read_component(folder: Path, component: str) -> tuple[Path, dict[str, Any], LazyWeights]:
    """Read a model's configuration and weights, from its own folder or from a pipeline's.

    Args:
        folder: the model's folder, or a pipeline's folder, of which the sub-folder ``component`` is read.
        component: e.g. ``unet``.

    Returns:
        The model's folder, its configuration and its weights.

    Raises:
        InputError: if a file is missing or damaged.
    """
    if (folder / component / "config.json").is_file():
        folder /= component
    return folder, read_json(folder / "config.json"), LazyWeights(_files(folder))


def find_pretrained(name_or_path: str | Path) -> Path:
    """Find the folder of a U-Net by path, or by OWNER/NAME on the Hugging Face hub, downloading it if need be.

    Raises:
        InputError: if there is no such folder and no such model on the hub.
    """
    files = [*MODEL_FILES, *(f"unet/{file}" for file in MODEL_FILES), SCHEDULER]
    return hub.resolve_model_folder(
        name_or_path, files, remedy="name a diffusers U-Net's folder, or OWNER/NAME on the hub"
    )


def _files(folder: Path) -> list[Path]:
    """Weight files of a folder: one file, or the shards that its index lists; a variant (fp16) if there is no other.

    The shortest name is the one without a variant.
    """
    indices = sorted(folder.glob(f"{WEIGHTS_NAME}*.safetensors.index.json"), key=_length)
    shards = set(folder.glob("*-of-*.safetensors"))
    unsharded = sorted(set(folder.glob(f"{WEIGHTS_NAME}*.safetensors")) - shards, key=_length)
    if unsharded and (not indices or _length(unsharded[0]) < _length(indices[0])):
        return unsharded[:1]
    if not indices:
        remedy = "save it with safe_serialization=True, or name another folder"
        raise InputError(folder, f"has no {WEIGHTS_NAME}.safetensors", remedy)
    weight_map = read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(indices[0], "does not map weights to files", RESTORE, place="weight_map")
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    A YAML parser would read numbers such as 1e-05 as text.

    Raises:
        InputError: if the file is missing or damaged.
    """
    try:
        value = json.loads(config.read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(path, f"is not valid JSON ({first_line(error)})", RESTORE) from None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", RESTORE)
    return value


def _length(path: Path) -> int:
    return len(path.name)


def _unreadable(file: Path, error: Exception) -> InputError:
    if not file.exists():
        return InputError(file, "does not exist", RESTORE)
    return InputError(file, f"cannot be read ({first_line(error)})", RESTORE)
