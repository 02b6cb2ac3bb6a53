"""Model folders by path, or by OWNER/NAME on the Hugging Face hub; only models named that way are downloaded."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from snapgen.errors import InputError, first_line

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Pattern of a model's name on the hub: OWNER/NAME."""


def resolve_model_folder(name_or_path: str | Path, files: Sequence[str], *, remedy: str) -> Path:
    """Find a local model folder, or download OWNER/NAME from the hub unless it is in the hub's cache.

    Args:
        name_or_path: path of a folder, or OWNER/NAME.
        files: glob patterns of the files to download.
        remedy: advice for the error if ``name_or_path`` is neither a folder nor of the form OWNER/NAME.

    Raises:
        InputError: if there is no such folder and no such model on the hub.
    """
    path = Path(name_or_path).expanduser()
    try:
        if name_or_path != "" and path.is_dir():
            return path
        exists = name_or_path != "" and path.exists()
    except (OSError, ValueError):  # the name is too long or has a null byte
        exists = False
    if exists:
        raise InputError(path, "is a file, not a folder", "name the folder that holds config.json and the weights")
    if isinstance(name_or_path, Path) or not HUB_NAME.fullmatch(name_or_path):
        raise InputError(name_or_path or "name", "does not exist", remedy)
    return _download(name_or_path, tuple(files))


@functools.cache
def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client raises its own exceptions and those of its HTTP library
        problem = f"is not a local folder and could not be downloaded from the hub ({first_line(error)})"
        raise InputError(name, problem, "check the name and the network, or name a folder") from None
