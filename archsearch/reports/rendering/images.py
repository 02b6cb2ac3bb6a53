"""Sample grids as data URIs, small enough that a report of a whole study can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

LONGEST_SIDE = 640
"""Pixels; a larger grid is scaled down."""

BUDGET = 12_000_000
"""Bytes of images in one page; what comes after it is left in the artifact folder."""


def embed_images(paths: Iterable[tuple[int, Path]], budget: int = BUDGET) -> dict[int, str]:
    """Data URI of each candidate's grid, in the order given, as long as they fit; unreadable ones are left out."""
    found: dict[int, str] = {}
    for number, path in paths:
        uri = data_uri(path)
        if uri is not None and len(uri) <= budget:
            found[number] = uri
            budget -= len(uri)
    return found


def data_uri(path: Path) -> str | None:
    """The image as it is or as WebP, whichever is smaller; None if there is none to be read."""
    from PIL import Image

    try:
        original = path.read_bytes()
        with Image.open(io.BytesIO(original)) as image:
            kind = (image.format or "").lower()
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            packed = io.BytesIO()
            image.convert("RGB").save(packed, "WEBP", quality=88, method=4)
            shrunk = (image.width, image.height) != Image.open(io.BytesIO(original)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if kind == "png" and not shrunk and len(original) <= packed.tell():
        return _uri("png", original)
    return _uri("webp", packed.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
