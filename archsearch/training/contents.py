"""Contents of what a recipe names by a path: a run is resumed on the same data and models, wherever they lie."""

from __future__ import annotations

from pathlib import Path

from archsearch.quality.resolve import SPLITS
from archsearch.training.compatibility import ResolvedShapes
from archsearch.training.recipe import Recipe, resolutions_of, unet_teacher
from snapgen.autoencoders import autoencoder
from snapgen.conditioning import text_encoder
from snapgen.data.dataset import source_digest
from snapgen.io import pretrained
from snapgen.io.digests import digest_contents


def contents_of(recipe: Recipe, shapes: ResolvedShapes) -> dict[str, str]:
    """Digests of data, autoencoder, text encoders, teachers and initial weights, by the setting that names them.

    Args:
        recipe: the recipe.
        shapes: its resolved shapes, with the folders of its teachers.

    Raises:
        InputError: if something is missing or unreadable.
    """
    contents = {"autoencoder": autoencoder.digest(recipe.autoencoder)}
    for side in sorted({side for stage in recipe.stages for side in resolutions_of(stage)}):
        for split in SPLITS:
            contents[f"data ({split}, {side} px)"] = source_digest(recipe.data, split=split, resolution=side)
    for place, encoders in (
        ("text_encoders", recipe.text_encoders),
        ("teacher.text_encoders", recipe.teacher_text_encoders),
    ):
        for number, encoder in enumerate(encoders):
            contents[f"{place}[{number}].encoder"] = text_encoder.digest(encoder.encoder)
    for own, net in shapes.teachers.items():
        if own is not None or (recipe.teacher is not None and recipe.teacher.path is not None):
            contents[f"teacher {own}" if own else "teacher.path"] = _digest(Path(net.source))
    for folder in filter(None, map(unet_teacher, recipe.stages)):
        contents[f"teacher {folder}"] = _digest(Path(folder))
    if recipe.init_weights is not None:
        contents["init_weights"] = _digest(Path(recipe.init_weights))
    return contents


def _digest(folder: Path) -> str:
    """Digest of a net's weights and configuration."""
    return digest_contents([folder / pretrained.CONFIG_NAME, *pretrained.weight_files(folder)])
