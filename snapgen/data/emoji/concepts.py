"""Concepts of emoji, by which the embedded data set is split: no held-out concept is in the training images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

VALIDATION_FRACTION = 0.12

# Images closer than this (root mean square over 16×16 RGB bytes) count as the same picture: the flags of Norway and
# Svalbard, man judge and judge. From about 7 on they are different emoji that look alike: speech and thought balloon.
SAME_PICTURE_RMS = 6.0

_TONE = re.compile(r"1f3f[b-f]")
_VARIANT = re.compile(r"-200d-(2640|2642|27a1)(?=-|$)")  # woman's, man's, facing right
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}


@dataclass(frozen=True)
class EmojiImage:
    """One vendor's image of an emoji, square and on white; ``code`` is its normalized hexcode."""

    vendor: str
    code: str
    image: Image.Image

    @property
    def key(self) -> str:
        """Name of the sample in a shard."""
        return f"{self.vendor}-{self.code}"


def normalize(hexcode: str) -> str:
    """Normalize a hexcode: lower case, at least four digits each, no presentation selectors and cancel tags."""
    codepoints = (digits.zfill(4) for digits in re.split("[-_]", hexcode.lower()))
    return "-".join(digits for digits in codepoints if digits not in ("fe0f", "e007f"))


def concept(code: str) -> str:
    """Hexcode of an emoji without its skin tone, gender and direction."""
    codepoints = [digits for digits in code.split("-") if not _TONE.fullmatch(digits)] or [code]
    return _VARIANT.sub("", "-".join(_NEUTRAL.get(digits, digits) for digits in codepoints))


def concepts(drawings: Sequence[EmojiImage]) -> dict[str, str]:
    """Map hexcodes to concepts, after merging concepts that share a picture (`SAME_PICTURE_RMS`)."""
    parent = {concept(drawing.code): concept(drawing.code) for drawing in drawings}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for i, j in np.argwhere(np.triu(same_picture(drawings, drawings), k=1)).tolist():
        first, second = sorted((root(concept(drawings[i].code)), root(concept(drawings[j].code))))
        parent[second] = first
    return {drawing.code: root(concept(drawing.code)) for drawing in drawings}


def same_picture(rows: Sequence[EmojiImage], columns: Sequence[EmojiImage]) -> npt.NDArray[np.bool_]:
    """Whether images count as the same picture (`SAME_PICTURE_RMS`): (len(rows), len(columns))."""
    a, b = _thumbnails(rows), _thumbnails(columns)
    # ‖a − b‖² = ‖a‖² + ‖b‖² − 2·a·b
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    same: npt.NDArray[np.bool_] = squares < SAME_PICTURE_RMS**2 * a.shape[1]
    return same


def _thumbnails(drawings: Sequence[EmojiImage]) -> npt.NDArray[np.float64]:
    """16×16 pixels of each image: (len(drawings), 768), integers, so that products are exact."""
    small = [np.asarray(drawing.image.resize((16, 16), Image.Resampling.LANCZOS)) for drawing in drawings]
    return np.asarray(small, dtype=np.float64).reshape(len(drawings), 16 * 16 * 3)


def split(concept_name: str) -> str:
    """Split of a concept: ``val`` for `VALIDATION_FRACTION` of them, chosen by hash, else ``train``."""
    fraction = int.from_bytes(hashlib.sha256(concept_name.encode()).digest()[:8], "big") / 2**64
    return "val" if fraction < VALIDATION_FRACTION else "train"


def without_leaks(
    drawings: Sequence[EmojiImage], present: Sequence[EmojiImage], split_of: Mapping[str, str]
) -> list[EmojiImage]:
    """Leave out drawings that would show a training image's picture in the validation split, or the reverse.

    The split is by hexcode, so two emoji of different splits may still share a picture in one of the styles.

    Args:
        drawings: the drawings to add.
        present: the drawings that are in the set already; they stay.
        split_of: split of each hexcode.

    Returns:
        The drawings whose picture is only in their own split. Of two that clash, the held-out one stays.
    """

    def select(images: Sequence[EmojiImage], name: str) -> list[EmojiImage]:
        return [drawing for drawing in images if split_of[drawing.code] == name]

    def without(images: list[EmojiImage], others: list[EmojiImage]) -> list[EmojiImage]:
        clashes = same_picture(images, others)
        return [drawing for drawing, clash in zip(images, clashes, strict=True) if not clash.any()]

    heldout = without(select(drawings, "val"), select(present, "train"))
    train = without(select(drawings, "train"), [*select(present, "val"), *heldout])
    return [*train, *heldout]
