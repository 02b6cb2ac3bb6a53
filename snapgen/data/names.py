"""Files of a data set by their names: images, captions beside them, and what programs leave."""

from __future__ import annotations

from pathlib import PurePosixPath

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".jpe", ".jfif", ".jif", ".tif", ".tiff", ".avif", ".apng"),
)
"""Suffixes of the images that are read; the first one counts if a sample of a shard has several."""
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".psb", ".xcf", ".svg", ".tga", ".ico", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".ppm", ".pgm", ".pbm", ".pnm", ".eps", ".dds"),
)
"""Suffixes of images that are not read."""
TEXT_SUFFIXES = (".txt", ".caption", ".cap")
"""Suffixes of files that hold one caption, in the order in which they count."""
CAPTION_SUFFIXES = (*TEXT_SUFFIXES, ".json")
"""Suffixes of the files beside an image that may hold its caption."""

_LITTER = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db"}
_LITTER_PREFIXES = (".", "synophoto_thumb", "synofile_thumb")
_THUMBNAILS = {"thumbs", "thumbnails", "_thumbs", "_thumbnails"}


def is_image(name: str) -> bool:
    """Whether a file has the suffix of an image that is read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_litter(name: str) -> bool:
    """Whether a file or a folder was left by a program: hidden, AppleDouble, a NAS's thumbnail, a recycle bin."""
    name = name.lower()
    return name in _LITTER or (name.startswith(_LITTER_PREFIXES) and name not in (".", ".."))


def is_litter_path(name: str) -> bool:
    """Whether a part of a path within an archive is litter."""
    return any(map(is_litter, PurePosixPath(name).parts))


def without_thumbnails(folders: list[str], *, beside_images: bool) -> list[str]:
    """The folders without those of thumbnails, where there is something else that they are thumbnails of."""
    others = [folder for folder in folders if folder.lower() not in _THUMBNAILS]
    return others if others or beside_images else folders


def caption_stem(name: str) -> tuple[str, str] | None:
    """The path of a caption's file without its suffix, which is that of its image with or without suffix.

    Returns:
        The stem and the suffix, as listed in `CAPTION_SUFFIXES`; None if the file's name is no caption's.
    """
    suffix = next((suffix for suffix in CAPTION_SUFFIXES if name.lower().endswith(suffix)), None)
    return None if suffix is None else (name[: -len(suffix)], suffix)


def without_suffix(name: str) -> str:
    """The path of an image without the last of its suffixes."""
    head, dot, tail = name.rpartition(".")
    return head if dot and "/" not in tail else name
