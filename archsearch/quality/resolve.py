"""Resolution of an evaluation protocol: digests of the files that it refers to."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol

if TYPE_CHECKING:
    from snapgen.data.dataset import ImageDataset


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def resolved(protocol: EvaluationProtocol) -> ResolvedProtocol:
    """The protocol with the digests of its data, autoencoder, text encoder, feature extractor and supernetwork.

    Raises:
        InputError: if one of them is missing or unreadable.
    """
    return resolve(protocol)[0]


def resolve(protocol: EvaluationProtocol) -> tuple[ResolvedProtocol, dict[Literal["train", "val"], ImageDataset]]:
    """Like `resolved`, and also return the images of each split."""
    from archsearch.quality import feature_extractors, supernet
    from snapgen.autoencoders import autoencoder
    from snapgen.conditioning import text_encoder
    from snapgen.data import dataset

    images = {
        split: dataset.load_dataset(protocol.data, split=split, resolution=protocol.resolution) for split in SPLITS
    }
    return ResolvedProtocol(
        protocol=protocol,
        data_digest=joint_digest(*(split.digest for split in images.values())),
        autoencoder_digest=autoencoder.digest(protocol.autoencoder),
        text_encoder_digest=text_encoder.digest(protocol.text_encoder),
        feature_extractor_digest=feature_extractors.digest(protocol.feature_extractor) if protocol.num_samples else "",
        init_from_digest=supernet.digest(protocol.init_from) if protocol.init_from is not None else "",
    ), images


def joint_digest(*digests: str) -> str:
    """Digest of several digests, in order; 16 hex digits."""
    return hashlib.sha256("/".join(digests).encode()).hexdigest()[:16]
