"""Embed sample grids as data URIs, small enough that the report of a whole study can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

MAX_SIDE = 640
"""Longest side of an embedded image in pixels; larger grids are scaled down."""

MAX_TOTAL_BYTES = 12_000_000
"""Total size of the images in one page; further images are not embedded and stay in the artifact folder."""


def embed_images(paths: Iterable[tuple[int, Path]], max_bytes: int = MAX_TOTAL_BYTES) -> dict[int, str]:
    """Data URI of each candidate's grid, in order, while they fit into ``max_bytes``; unreadable files are skipped."""
    uris: dict[int, str] = {}
    for number, path in paths:
        uri = data_uri(path)
        if uri is not None and len(uri) <= max_bytes:
            uris[number] = uri
            max_bytes -= len(uri)
    return uris


def data_uri(path: Path) -> str | None:
    """Encode an image file as a data URI, as WebP or unchanged, whichever is smaller; None if it cannot be read."""
    from PIL import Image

    try:
        original = path.read_bytes()
        with Image.open(io.BytesIO(original)) as image:
            file_format = (image.format or "").lower()
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            webp = io.BytesIO()
            image.convert("RGB").save(webp, "WEBP", quality=88, method=4)
            shrunk = (image.width, image.height) != Image.open(io.BytesIO(original)).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if file_format == "png" and not shrunk and len(original) <= webp.tell():
        return _uri("png", original)
    return _uri("webp", webp.getvalue())


def _uri(file_format: str, content: bytes) -> str:
    return f"data:image/{file_format};base64,{base64.b64encode(content).decode()}"
