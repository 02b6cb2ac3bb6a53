"""A diffusers net's configuration and weights, from a folder or the hub: safetensors, in one file or in shards."""

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

NAME = "diffusion_pytorch_model"
RESTORE = "restore it from where it came"
SCHEDULER = "scheduler/scheduler_config.json"
"""In a pipeline's folder: how it draws."""
WEIGHTS = ("config.json", f"{NAME}.safetensors", f"{NAME}.safetensors.index.json", f"{NAME}-*-of-*.safetensors")
"""The files of a net, as diffusers writes them."""


class LazyWeights(Mapping[str, Tensor]):
    """Tensors by name, each read when asked for.

    Args:
        files: the safetensors files that hold them.

    Raises:
        InputError: if a file is missing, damaged or no safetensors.
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
    """The configuration and the weights of a folder that diffusers' ``save_pretrained`` wrote.

    Args:
        folder: a U-Net's, or a pipeline's, whose ``unet`` is taken.

    Raises:
        InputError: if anything is missing or damaged.
    """
    return read_part(folder, "unet")[1:]


def read_part(folder: Path, part: str) -> tuple[Path, dict[str, Any], LazyWeights]:
    """A net's folder, configuration and weights; of a pipeline's folder its ``part`` is taken.

    Raises:
        InputError: if anything is missing or damaged.
    """
    if (folder / part / "config.json").is_file():
        folder /= part
    return folder, read_json(folder / "config.json"), LazyWeights(_files(folder))


def find_pretrained(name_or_path: str | Path) -> Path:
    """The folder of that path, or of that name on the Hugging Face hub, fetched if it is not here yet.

    Raises:
        InputError: if there is neither.
    """
    files = [*WEIGHTS, *(f"unet/{file}" for file in WEIGHTS), SCHEDULER]
    return hub.resolve_model_folder(
        name_or_path, files, remedy="name a diffusers U-Net's folder, or OWNER/NAME on the hub"
    )


def _files(folder: Path) -> list[Path]:
    """A folder's weights: one file, or those that its index names; a variant (fp16) where there is no other."""
    found = sorted(folder.glob(f"{NAME}*.safetensors.index.json"), key=_length)
    whole = sorted(set(folder.glob(f"{NAME}*.safetensors")) - set(folder.glob("*-of-*.safetensors")), key=_length)
    if whole and (not found or _length(whole[0]) < _length(found[0])):
        return whole[:1]
    if not found:
        remedy = "save it with safe_serialization=True, or name another folder"
        raise InputError(folder, f"holds no {NAME}.safetensors", remedy)
    places = read_json(found[0]).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(found[0], "maps no weights to files", RESTORE, place="weight_map")
    return [folder / name for name in sorted(set(places.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; as YAML, 1e-05 would be text.

    Raises:
        InputError: if it is missing or damaged.
    """
    try:
        value = json.loads(config.read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(path, f"is no JSON ({first_line(error)})", RESTORE) from None
    if not isinstance(value, dict):
        raise InputError(path, "holds no JSON object", RESTORE)
    return value


def _length(path: Path) -> int:
    return len(path.name)


def _unreadable(file: Path, error: Exception) -> InputError:
    if not file.exists():
        return InputError(file, "does not exist", RESTORE)
    return InputError(file, f"cannot be read ({first_line(error)})", RESTORE)
