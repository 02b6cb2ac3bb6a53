"""Facts in the header of a safetensors file, which the hub shows and every reader returns as its metadata."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from snapgen.io.atomic import atomic_write

_LENGTH_BYTES = 8


def add_facts(path: Path, facts: Mapping[str, str]) -> None:
    """Add facts to a file's metadata; its tensors are copied as they lie."""
    with path.open("rb") as source, atomic_write(path) as temporary, temporary.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(_LENGTH_BYTES), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **facts}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        target.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        shutil.copyfileobj(source, target, 1 << 20)
