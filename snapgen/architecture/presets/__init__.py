"""Named architectures, stored as YAML beside this file: published designs, and small ones for the emoji data set."""

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
"""Name by which commands accept the decoder of `snapgen.autoencoders.tiny_decoder` at the paper's size.

It is not an `Architecture`, hence not among `NAMES`."""


def preset(name: str) -> Architecture:
    """Load a preset by its name.

    Raises:
        InputError: if there is no such preset; the message lists the names.
    """
    if name not in NAMES:
        raise InputError(name, "is not a preset", f"use one of: {', '.join(NAMES)}")
    with resources.as_file(resources.files(__name__) / f"{name}.yaml") as path:
        return Architecture.load(path)


def resolve(name_or_path: str, *, other_names: Sequence[str] = ()) -> Architecture:
    """Load a preset by its name, or an architecture from a JSON or YAML file.

    Args:
        name_or_path: name of a preset, or path of a file.
        other_names: further names that the caller accepts, for the error message.

    Raises:
        InputError: if there is neither, or the file does not describe an architecture.
    """
    if name_or_path in NAMES:
        return preset(name_or_path)
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        names = ", ".join([*NAMES, *other_names])
        raise InputError(name_or_path, "is neither a preset nor a file", f"use one of: {names}; or name a file")
    return Architecture.load(path)
