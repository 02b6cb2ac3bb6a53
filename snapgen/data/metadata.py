"""Image files without their metadata: damaged or oversized metadata must not cost the pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# Chunks and segments of metadata that change how the pixels look, first all and then the indispensable ones.
_PNG_KEPT = ({b"tRNS", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"sRGB"}, {b"tRNS"})
_EXIF, _APP1 = b"Exif\0\0", 0xE1
_JPEG_KEPT = ({0xE0, _APP1, 0xE2, 0xEE}, {0xE0, 0xEE})  # JFIF, Exif, colour profile, Adobe
_START_OF_SCAN = 0xDA


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Versions of a PNG or JPEG file with ever less metadata; none for other files, or if there is none to leave out.

    The first version has no texts, the second nothing but the pixels and how they are to be read.
    """
    versions: Iterator[bytes] = iter(())
    if content.startswith(_PNG):
        versions = (b"".join(_png_parts(content, keep)) for keep in _PNG_KEPT)
    elif content.startswith(_JPEG):
        versions = (b"".join(_jpeg_parts(content, keep)) for keep in _JPEG_KEPT)
    previous = content
    for version in versions:
        if version != previous:
            yield version
        previous = version


def _png_parts(content: bytes, keep: set[bytes]) -> Iterator[bytes]:
    """The signature, and the critical chunks and those to keep. A chunk is length, type, data and checksum."""
    yield _PNG
    start = len(_PNG)
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        if kind[:1].isupper() or kind in keep:
            yield content[start : start + length + 12]
        start += length + 12


def _jpeg_parts(content: bytes, keep: set[int]) -> Iterator[bytes]:
    """Everything but application segments that are not kept, and comments. A segment is marker, length and data."""
    yield _JPEG
    start = len(_JPEG)
    while start + 4 <= len(content) and content[start] == 0xFF and content[start + 1] != _START_OF_SCAN:
        marker, length = content[start + 1], struct.unpack_from(">H", content, start + 2)[0]
        stop = start + 2 + length
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        is_xmp = marker == _APP1 and not content[start + 4 : stop].startswith(_EXIF)
        if not is_metadata or (marker in keep and not is_xmp):
            yield content[start:stop]
        start = stop
    yield content[start:]
