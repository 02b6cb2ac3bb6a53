"""Resolution of an evaluation protocol: digests of the files that it refers to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol

if TYPE_CHECKING:
    from snapgen.training.data import TrainingData


SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


def resolved(protocol: EvaluationProtocol, data: TrainingData | None = None) -> ResolvedProtocol:
    """The protocol with the digests of everything that it names by a path.

    Args:
        protocol: the protocol.
        data: its data, if they are needed further.

    Raises:
        InputError: if one of them is missing or unreadable.
    """
    from archsearch.quality import feature_extractors, supernet
    from snapgen.conditioning import text_encoder
    from snapgen.devices import default_device
    from snapgen.io import pretrained
    from snapgen.io.digests import digest_contents
    from snapgen.objectives.teacher import load_on_meta
    from snapgen.training.data import TrainingData

    data = data or TrainingData(protocol.data, protocol.autoencoder, protocol.text_encoders, device=default_device())
    teacher_digest = ""
    if protocol.distillation is not None:
        teacher = load_on_meta(protocol.distillation.teacher)
        teacher.check_padding(protocol.teacher_text_encoders or ())
        folder = Path(teacher.source)
        files = [folder / pretrained.CONFIG_NAME, *pretrained.weight_files(folder)]
        encoders = protocol.distillation.teacher_text_encoders or ()
        told = "/".join([teacher.prediction, *(text_encoder.digest(each.encoder) for each in encoders)])
        teacher_digest = digest_contents(files, told)
    return ResolvedProtocol(
        protocol=protocol,
        data_digest=digest_contents([], "/".join(data.images(split, protocol.resolution).digest for split in SPLITS)),
        autoencoder_digest=data.autoencoder_digest,
        text_encoder_digest=text_encoder.digest(protocol.text_encoder),
        feature_extractor_digest=feature_extractors.digest(protocol.feature_extractor) if protocol.num_samples else "",
        init_from_digest=supernet.digest(protocol.init_from) if protocol.init_from is not None else "",
        teacher_digest=teacher_digest,
    )
