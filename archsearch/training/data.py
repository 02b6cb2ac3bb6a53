"""What a training reads: images as latents, captions under the encoders of student and teacher, computed once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from archsearch.training.recipe import Recipe
from snapgen.autoencoders import autoencoder as coders
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.latents import latents
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import Captions, EncoderSettings
from snapgen.data.dataset import Images, open_images
from snapgen.data.sources import Split
from snapgen.devices import fits
from snapgen.io.chunked import Rows


@dataclass(frozen=True)
class Encoded:
    """A split at a resolution."""

    images: Images
    latents: Rows
    student: Captions
    teacher: Captions
    """The student's own object where both read the same encoders."""


class Material:
    """A recipe's data on a device; every part is made when it is first asked for, and kept in the cache."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The recipe's, on the device."""
        return coders.load(self.recipe.autoencoder).to(self.device)

    @functools.cached_property
    def autoencoder_digest(self) -> str:
        """Of its weights."""
        return coders.digest(self.recipe.autoencoder)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the training
    def images(self, split: Split, resolution: int) -> Images:
        """A split of the data."""
        return open_images(self.recipe.data, split=split, resolution=resolution)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def encoded(self, split: Split, resolution: int) -> Encoded:
        """A split's latents and captions; on the device where they fit."""
        images = self.images(split, resolution)
        rows = latents(images, self.autoencoder, digest=self.autoencoder_digest, device=self.device)
        student = self._captions(images.captions, self.recipe.text)
        own = self.recipe.teacher is None or self.recipe.teacher.text is None
        teacher = student if own else self._captions(images.captions, self.recipe.teacher_text)
        return Encoded(images, rows.to(self.device) if fits(rows.nbytes, self.device) else rows, student, teacher)

    def _captions(self, captions: Sequence[str], encoders: Sequence[EncoderSettings]) -> Captions:
        found = conditioning.encode(captions, encoders)
        return found.to(self.device) if fits(found.nbytes, self.device) else found
