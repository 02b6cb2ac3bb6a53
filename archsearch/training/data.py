"""What a training reads: images as latents, captions under the encoders of student and teacher, computed once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from archsearch.training.recipe import Recipe
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.latents import encode_dataset
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import EncodedCaptions, TextEncoderConfig
from snapgen.data.dataset import ImageDataset, open_images
from snapgen.data.sources import Split
from snapgen.devices import fits_on_device
from snapgen.io.chunked import ChunkedTensor


@dataclass(frozen=True)
class EncodedDataset:
    """A split at a resolution."""

    images: ImageDataset
    latents: ChunkedTensor
    student: EncodedCaptions
    teacher: EncodedCaptions
    """The student's own object where both read the same encoders."""


class RecipeData:
    """A recipe's data on a device; every part is made when it is first asked for, and kept in the cache."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The recipe's, on the device."""
        return autoencoder.load_autoencoder(self.recipe.autoencoder).to(self.device)

    @functools.cached_property
    def autoencoder_digest(self) -> str:
        """Of its weights."""
        return autoencoder.digest(self.recipe.autoencoder)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the training
    def images(self, split: Split, resolution: int) -> ImageDataset:
        """A split of the data."""
        return open_images(self.recipe.data, split=split, resolution=resolution)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def encoded(self, split: Split, resolution: int) -> EncodedDataset:
        """A split's latents and captions; on the device where they fit."""
        images = self.images(split, resolution)
        rows = encode_dataset(images, self.autoencoder, digest=self.autoencoder_digest, device=self.device)
        student = self._captions(images.captions, self.recipe.text)
        own = self.recipe.teacher is None or self.recipe.teacher.text is None
        teacher = student if own else self._captions(images.captions, self.recipe.teacher_text)
        return EncodedDataset(
            images, rows.to(self.device) if fits_on_device(rows.nbytes, self.device) else rows, student, teacher
        )

    def _captions(self, captions: Sequence[str], encoders: Sequence[TextEncoderConfig]) -> EncodedCaptions:
        found = conditioning.encode(captions, encoders)
        return found.to(self.device) if fits_on_device(found.nbytes, self.device) else found
