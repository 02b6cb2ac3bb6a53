"""The images of the small check: some of the embedded emoji in a folder of their own."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from snapgen.data.dataset import open_images

TRAIN, HELD = 40, 10
RESOLUTION = 32


def written(folder: Path) -> Path:
    """The folder, filled if it is not there: a sub-folder a split, a text file with its caption beside every image."""
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.new")
    for split, count in (("train", TRAIN), ("val", HELD)):
        (part / split).mkdir(parents=True)
        images = open_images("emoji", split=split, resolution=RESOLUTION)  # type: ignore[arg-type]
        for number, (pixels, caption) in enumerate(zip(images.pixels[:count], images.captions, strict=False)):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(part / split / f"{number:03d}.png")
            (part / split / f"{number:03d}.txt").write_text(caption)
    part.rename(folder)
    return folder
