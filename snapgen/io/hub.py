"""A model's folder by path, or by its name on the Hugging Face hub: nothing is fetched but what is named so."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from snapgen.errors import InputError, first_line

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""OWNER/NAME."""


def resolve_model_folder(name_or_path: str | Path, files: Sequence[str], *, remedy: str) -> Path:
    """The folder of that path; or of OWNER/NAME on the hub, fetched if it is not here yet.

    Args:
        files: patterns of those to fetch.
        remedy: for the message if there is no such folder and it is no name on the hub.

    Raises:
        InputError: if there is neither.
    """
    path = Path(name_or_path).expanduser()
    try:
        if name_or_path != "" and path.is_dir():
            return path
        exists = name_or_path != "" and path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        exists = False
    if exists:
        raise InputError(path, "is a file, not a folder", "name the folder that holds config.json and the weights")
    if isinstance(name_or_path, Path) or not NAME.fullmatch(name_or_path):
        raise InputError(name_or_path or "name", "does not exist", remedy)
    return _fetched(name_or_path, tuple(files))


@functools.cache
def _fetched(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises kinds of its own, and those of its HTTP library
        problem = f"is no folder here and could not be fetched from the hub ({first_line(error)})"
        raise InputError(name, problem, "check the name and the network, or name a folder") from None
