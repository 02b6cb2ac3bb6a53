"""Fill in what an evaluation protocol leaves to its data: digests and splits."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol

if TYPE_CHECKING:
    from snapgen.data.dataset import ImageDataset


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def resolved(protocol: EvaluationProtocol) -> ResolvedProtocol:
    """The protocol with the digests of all that it names, which is opened: data, autoencoder, text encoder, extractor,
    trained U-Net.

    Raises:
        InputError: if one of them is missing or unreadable.
    """
    return resolve(protocol)[0]


def resolve(protocol: EvaluationProtocol) -> tuple[ResolvedProtocol, dict[Literal["train", "val"], ImageDataset]]:
    """As `resolved`, with the images of each split, which had to be opened."""
    from archsearch.quality import feature_extractors, supernet
    from snapgen.autoencoders import autoencoder
    from snapgen.conditioning import text_encoder
    from snapgen.data import dataset

    images = {
        split: dataset.open_images(protocol.data, split=split, resolution=protocol.resolution) for split in SPLITS
    }
    return ResolvedProtocol(
        protocol=protocol,
        data_digest=joint_digest(*(split.digest for split in images.values())),
        autoencoder_digest=autoencoder.digest(protocol.autoencoder),
        text_digest=text_encoder.digest(protocol.text),
        extractor_digest=feature_extractors.digest(protocol.extractor) if protocol.samples else "",
        inherit_digest=supernet.digest(protocol.inherit) if protocol.inherit is not None else "",
    ), images


def joint_digest(*digests: str) -> str:
    """One digest of several, in order; 16 hex digits."""
    return hashlib.sha256("/".join(digests).encode()).hexdigest()[:16]
