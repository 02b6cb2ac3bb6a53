"""A set's images as latents, computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.data.dataset import ImageDataset
from snapgen.errors import InputError
from snapgen.io import chunked
from snapgen.io.cache import JSON
from snapgen.io.chunked import ChunkedTensor
from snapgen.progress import Progress

BATCH = 128


def encode_dataset(images: ImageDataset, coder: Autoencoder, *, digest: str, device: torch.device) -> ChunkedTensor:
    """The latents of images, computed and kept in parts: sets larger than memory, and interrupted ones, too.

    Args:
        coder: on ``device``.
        digest: the autoencoder's, as `snapgen.autoencoders.autoencoder.digest` gives it.

    Returns:
        float16 ``(len(images), C, H, W)`` on the CPU, memory-mapped, a row a caption.

    Raises:
        InputError: if the autoencoder does not divide the resolution, or a file was changed after the set was opened.
    """
    encoding = _Encoding(images, coder, device)

    def key(part: range) -> dict[str, JSON]:
        kept: dict[str, JSON] = {"images": images.digest, "autoencoder": digest, "resolution": images.resolution}
        return {**kept, "first": part.start, "rows": len(part)}

    row_bytes = 2 * coder.latent_channels * (images.resolution // coder.factor) ** 2
    ranges = chunked.chunk_ranges(len(images), row_bytes, multiple=BATCH)
    return chunked.cached_chunks("latents", ranges, key, lambda part: {"latents": encoding(part)})["latents"]


class _Encoding:
    """A pass over the images, begun anew where parts were computed before."""

    def __init__(self, images: ImageDataset, coder: Autoencoder, device: torch.device) -> None:
        self.images, self.coder, self.device = images, coder, device
        self.progress = Progress(images.name, "encoded", "images", len(images))
        self.reached = 0
        self.batches: Iterator[Tensor] | None = None

    def __call__(self, part: range) -> Tensor:
        """The latents of a part of the images."""
        if self.batches is None or self.reached != part.start:
            self.batches = self.images.batches(BATCH, start=part.start)
            self.progress.skip(part.start - self.reached)
        self.reached = part.stop
        return torch.cat([self._encoded(next(self.batches)) for _ in range(0, len(part), BATCH)])

    @torch.no_grad()
    def _encoded(self, batch: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 → latents, half precision."""
        try:
            found = self.coder.encode(batch.to(self.device) / 127.5 - 1).half().cpu()
        except ValueError as error:
            raise InputError(self.images.name, str(error), "or use another autoencoder", place="resolution") from None
        self.progress.add(len(batch))
        return found
