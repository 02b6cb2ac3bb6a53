"""Architectures with a name, as data beside this file: the published designs, and small ones for the embedded emoji."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

NAMES = (
    "snapgen-baseline",
    "snapgen-imagenet",
    "snapgen-t2i",
    "snapgen-emoji",
    "sd15",
    "sd15-emoji",
    "sdxl",
    "snapfusion",
)

TINY_DECODER = "tiny-decoder"
"""What commands call the paper-size `snapgen.autoencoders.tiny_decoder`, which is no architecture, beside these
names."""


def preset(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        InputError: if there is none; the message lists the names.
    """
    if name not in NAMES:
        raise InputError(name, "is no preset", f"use one of: {', '.join(NAMES)}")
    with resources.as_file(resources.files(__name__) / f"{name}.yaml") as path:
        return Architecture.load(path)


def resolve(name_or_path: str, *, besides: Sequence[str] = ()) -> Architecture:
    """The architecture of a preset's name, or of a JSON or YAML file.

    Args:
        name_or_path: either.
        besides: other names that the caller takes, for the message.

    Raises:
        InputError: if it is neither, or the file is no architecture.
    """
    if name_or_path in NAMES:
        return preset(name_or_path)
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        names = ", ".join([*NAMES, *besides])
        raise InputError(name_or_path, "is neither a preset nor a file", f"use one of: {names}; or name a file")
    return Architecture.load(path)
