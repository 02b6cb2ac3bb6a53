"""Resolution of an evaluation protocol: digests of the files that it refers to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol

if TYPE_CHECKING:
    from snapgen.training.data import TrainingData


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def resolved(protocol: EvaluationProtocol, data: TrainingData | None = None) -> ResolvedProtocol:
    """The protocol with the digests of its data, autoencoder, text encoder, feature extractor and supernetwork.

    Args:
        protocol: the protocol.
        data: its data, if they are needed further.

    Raises:
        InputError: if one of them is missing or unreadable.
    """
    from archsearch.quality import feature_extractors, supernet
    from snapgen.conditioning import text_encoder
    from snapgen.devices import default_device
    from snapgen.io.digests import digest_contents
    from snapgen.training.data import TrainingData

    data = data or TrainingData(protocol.data, protocol.autoencoder, protocol.text_encoders, device=default_device())
    return ResolvedProtocol(
        protocol=protocol,
        data_digest=digest_contents([], "/".join(data.images(split, protocol.resolution).digest for split in SPLITS)),
        autoencoder_digest=data.autoencoder_digest,
        text_encoder_digest=text_encoder.digest(protocol.text_encoder),
        feature_extractor_digest=feature_extractors.digest(protocol.feature_extractor) if protocol.num_samples else "",
        init_from_digest=supernet.digest(protocol.init_from) if protocol.init_from is not None else "",
    )
