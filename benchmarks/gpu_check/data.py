"""Images of the small check: a few of the embedded emoji in a folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from snapgen.data.dataset import load_dataset

NUM_TRAIN, NUM_HELDOUT = 40, 10
RESOLUTION = 32


def write_images(folder: Path) -> Path:
    """Create the folder if it does not exist: one sub-folder per split, images with a text file for each caption."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.new")
    for split, count in (("train", NUM_TRAIN), ("val", NUM_HELDOUT)):
        (temporary / split).mkdir(parents=True)
        images = load_dataset("emoji", split=split, resolution=RESOLUTION)  # type: ignore[arg-type]
        for number, (pixels, caption) in enumerate(zip(images.pixels[:count], images.captions, strict=False)):
            # (3, H, W) -> (H, W, 3)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary / split / f"{number:03d}.png")
            (temporary / split / f"{number:03d}.txt").write_text(caption)
    temporary.rename(folder)
    return folder
