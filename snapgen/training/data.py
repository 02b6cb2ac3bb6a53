"""Data of a training run: images as latents, and captions encoded for student and teacher, computed once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.latents import encode_dataset
from snapgen.conditioning import captions as conditioning
from snapgen.conditioning.captions import EncodedCaptions, TextEncoderConfig
from snapgen.data.dataset import ImageDataset, load_dataset
from snapgen.data.sources import Split
from snapgen.devices import fits_on_device
from snapgen.io.chunked import ChunkedTensor


@dataclass(frozen=True)
class EncodedDataset:
    """Latents and encoded captions of one split at one resolution."""

    images: ImageDataset
    latents: ChunkedTensor
    """(N, C, H, W)."""
    student: EncodedCaptions
    teacher: EncodedCaptions
    """The same object as ``student`` if both use the same text encoders."""


class TrainingData:
    """Images and captions, encoded on a device; every item is computed on first use and cached on disk.

    Args:
        data: emoji, a folder of images, or webdataset shards.
        autoencoder: emoji, none (pixels), a folder, or a name on the hub.
        text_encoders: text encoders of the net that is trained.
        teacher_text_encoders: text encoders of its teacher; None: the same.
        device: where images are encoded, and where the encoded data are kept if they fit.
    """

    def __init__(
        self,
        data: str,
        autoencoder: str,
        text_encoders: Sequence[TextEncoderConfig],
        *,
        teacher_text_encoders: Sequence[TextEncoderConfig] | None = None,
        device: torch.device,
    ) -> None:
        self.text_encoders, self.teacher_text_encoders = tuple(text_encoders), tuple(teacher_text_encoders or ())
        self.device = device
        self._autoencoder = autoencoder
        # Caches of these data, without a circle: one on a method would keep those of finished trainings in memory.
        self._loaded = functools.lru_cache(maxsize=4)(functools.partial(load_dataset, data))
        self._encoded = functools.lru_cache(maxsize=4)(functools.partial(TrainingData._encode, weakref.proxy(self)))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, on the device."""
        return autoencoder.load_autoencoder(self._autoencoder).to(self.device)

    @functools.cached_property
    def autoencoder_digest(self) -> str:
        """Digest of the autoencoder's weights."""
        return autoencoder.digest(self._autoencoder)

    def images(self, split: Split, resolution: int) -> ImageDataset:
        """Images of one split, resized to a resolution."""
        return self._loaded(split=split, resolution=resolution)

    def encoded(self, split: Split, resolution: int) -> EncodedDataset:
        """Latents and encoded captions of one split; on the device if they fit there."""
        return self._encoded(split, resolution)

    def _encode(self, split: Split, resolution: int) -> EncodedDataset:
        images = self.images(split, resolution)
        latents = encode_dataset(images, self.autoencoder, digest=self.autoencoder_digest, device=self.device)
        student = self._captions(images.captions, self.text_encoders)
        shares_encoders = self.teacher_text_encoders in ((), self.text_encoders)
        teacher = student if shares_encoders else self._captions(images.captions, self.teacher_text_encoders)
        if fits_on_device(latents.nbytes, self.device):
            latents = latents.to(self.device)
        return EncodedDataset(images, latents, student, teacher)

    def _captions(self, captions: Sequence[str], encoders: Sequence[TextEncoderConfig]) -> EncodedCaptions:
        encoded = conditioning.encode(captions, encoders)
        return encoded.to(self.device) if fits_on_device(encoded.nbytes, self.device) else encoded
