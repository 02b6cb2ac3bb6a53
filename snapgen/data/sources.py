"""Interface of all sources of captioned images: samples in a fixed order, and what is told of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from snapgen.errors import InputError
from snapgen.findings import Findings

Split = Literal["train", "val"]

NOT_USED = "also has files that are not used"
"""Beginning of a note on files of a source that are no samples."""
# A source without a val split of its own reserves one image in ten for validation, by the hash of its name.
VALIDATION_FRACTION = 0.1


class RawSample(NamedTuple):
    """An image, not yet decoded, and its caption."""

    caption: str
    image: Path | bytes
    """Path or content; empty bytes if there is a problem."""
    name: str
    """Name in messages."""
    problem: str = ""
    """Why the image cannot be used, as a predicate of several (``have no caption``); empty if it can."""


class Source(ABC):
    """Captioned images of one split in a fixed order."""

    count: int | None = None
    """Number of samples; None before a source is read that must be read for it."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        """Files that could not be read to their end, known after `samples`."""
        self.remarks = Findings()
        """Files in the shards that are no samples, known after `samples`."""
        self.notes: list[str] = []
        """Notes for the user on how the source was read: which part is held out, whose captions are names."""

    @abstractmethod
    def samples(self) -> Iterator[RawSample]:
        """Yield the samples in a fixed order."""

    @abstractmethod
    def digest(self) -> str:
        """16 hex digits of a hash of the images and captions."""

    @abstractmethod
    def empty_error(self, name: str, split: Split) -> InputError:
        """Error for a split without a sample."""


def in_split(key: str, split: Split | None) -> bool:
    """Whether the image of a name falls into a split by the name's hash; None stands for all."""
    is_validation = hash_of(key) < VALIDATION_FRACTION * 2**64
    return split is None or is_validation == (split == "val")


def hash_of(key: str) -> int:
    """A name's hash, of 64 bits."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogateescape")).digest()[:8], "big")
