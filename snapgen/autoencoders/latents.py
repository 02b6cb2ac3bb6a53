"""Encodes a data set's images to latents once and caches them."""

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
from snapgen.progress import ProgressLog

ENCODE_BATCH_SIZE = 128


def encode_dataset(
    images: ImageDataset, autoencoder: Autoencoder, *, digest: str, device: torch.device
) -> ChunkedTensor:
    """The latents of a data set, cached in chunks, so that it may exceed memory and an interrupted pass resumes.

    Args:
        images: the data set.
        autoencoder: on ``device``.
        digest: the autoencoder's digest (`snapgen.autoencoders.autoencoder.digest`).
        device: where images are encoded.

    Returns:
        float16 ``(len(images), C, H, W)`` on the CPU, memory-mapped.

    Raises:
        InputError: if the resolution is not divisible by the autoencoder's factor, or a file has changed since the data
            set was opened.
    """
    progress = ProgressLog(images.name, "encoded", "images", len(images))
    batches: Iterator[Tensor] = iter(())
    position = -1

    def encode(chunk: range) -> dict[str, Tensor]:
        nonlocal batches, position
        if position != chunk.start:  # the chunks before came from the cache
            batches = images.batches(ENCODE_BATCH_SIZE, start=chunk.start)
            progress.skip_to(chunk.start)
        position = chunk.stop
        encoded = []
        for _ in range(0, len(chunk), ENCODE_BATCH_SIZE):
            encoded.append(_encode(next(batches).to(device), autoencoder, images.name))
            progress.add(len(encoded[-1]))
        return {"latents": torch.cat(encoded)}

    def key(chunk: range) -> dict[str, JSON]:
        shared: dict[str, JSON] = {"images": images.digest, "autoencoder": digest, "resolution": images.resolution}
        return {**shared, "first": chunk.start, "rows": len(chunk)}

    row_bytes = 2 * autoencoder.latent_channels * (images.resolution // autoencoder.factor) ** 2
    chunks = chunked.chunk_ranges(len(images), row_bytes, multiple=ENCODE_BATCH_SIZE)
    return chunked.cached_chunks("latents", chunks, key, encode)["latents"]


@torch.no_grad()
def _encode(batch: Tensor, autoencoder: Autoencoder, name: str) -> Tensor:
    """(N, 3, H, W) uint8 → (N, C, h, w) float16 on the CPU."""
    try:
        return autoencoder.encode(batch / 127.5 - 1).half().cpu()  # [0, 255] → [-1, 1]
    except ValueError as error:
        raise InputError(name, str(error), "or use another autoencoder", place="resolution") from None
