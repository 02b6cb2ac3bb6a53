"""Data shared by all candidates of a protocol: latents, contexts, prompts and reference statistics, cached on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from archsearch.protocol import EvaluationProtocol, ResolvedProtocol
from archsearch.quality import feature_extractors
from archsearch.quality.distances import ReferenceStats, reference
from archsearch.quality.feature_extractors import FeatureExtractor
from archsearch.quality.resolve import SPLITS, resolve
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.latents import ENCODE_BATCH_SIZE, encode_dataset
from snapgen.conditioning import embeddings
from snapgen.data.dataset import ImageDataset
from snapgen.devices import fits_on_device
from snapgen.io.cache import cached_tensors
from snapgen.seeding import derive_seed
from snapgen.training.short_run import LatentDataset

FIXED = 0
"""Seed of everything that all candidates of all studies share: prompts, sampling noise and validation pairs."""


@dataclass(frozen=True)
class EvaluationData:
    """Data of a protocol, loaded on a device."""

    resolved: ResolvedProtocol
    training: LatentDataset
    validation: Tensor
    """Latents of the held-out images of the validation pairs, (pairs, C, H, W)."""
    validation_context: Tensor
    """Text embeddings of the validation pairs, (pairs, tokens, width)."""
    prompts: list[str]
    """Captions of held-out concepts, one per sample."""
    prompt_context: Tensor
    """Text embeddings of the prompts, (samples, tokens, width)."""
    decoder: Autoencoder
    extractor: FeatureExtractor | None
    reference: ReferenceStats | None
    """Statistics of the training images; None, like `extractor`, if the protocol generates no samples."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.validation.shape[1:]
        return channels, height, width


def load_evaluation_data(protocol: EvaluationProtocol, device: torch.device) -> EvaluationData:
    """Load or compute the data of a protocol.

    Raises:
        InputError: if the data, autoencoder, text encoder or extractor cannot be loaded, or are incompatible.
    """
    resolved, images = resolve(protocol)
    decoder = autoencoder.load_autoencoder(protocol.autoencoder).to(device)
    train, held_out = (_load_latents(images[split], protocol, resolved, decoder, device) for split in SPLITS)
    pairs = torch.arange(protocol.validation_pairs) * len(held_out) // protocol.validation_pairs
    validation, validation_context = held_out.batch(pairs)
    prompts = fixed_prompts(images["val"].captions, protocol.num_samples)
    extractor = (
        feature_extractors.load_extractor(protocol.feature_extractor).to(device) if protocol.num_samples else None
    )
    return EvaluationData(
        resolved=resolved,
        training=train,
        validation=validation.to(device),
        validation_context=validation_context.to(device),
        prompts=prompts,
        prompt_context=embeddings.encode(prompts, name=protocol.text_encoder, tokens=protocol.context_tokens)
        .float()
        .to(device),
        decoder=decoder,
        extractor=extractor,
        reference=None
        if extractor is None
        else reference_of(
            images["train"],
            extractor,
            digest=resolved.feature_extractor_digest,
            feature_resolution=protocol.feature_resolution,
            device=device,
        ),
    )


def _load_latents(
    images: ImageDataset,
    protocol: EvaluationProtocol,
    resolved: ResolvedProtocol,
    encoder: Autoencoder,
    device: torch.device,
) -> LatentDataset:
    latents = encode_dataset(images, encoder, digest=resolved.autoencoder_digest, device=device)
    captions, rows = embeddings.deduplicate(images.captions)
    contexts = embeddings.embed_captions(captions, name=protocol.text_encoder, tokens=protocol.context_tokens).tokens
    examples = LatentDataset(cast(Tensor, latents), cast(Tensor, contexts), rows)
    return (
        examples.to(device) if fits_on_device(examples.latents.nbytes + examples.contexts.nbytes, device) else examples
    )


def fixed_prompts(captions: list[str], count: int) -> list[str]:
    """The first ``count`` distinct captions in a fixed shuffled order, repeated if there are too few.

    Repeated captions are sampled with other noise.
    """
    distinct = sorted(set(captions))
    order = torch.randperm(
        len(distinct), generator=torch.Generator().manual_seed(derive_seed(FIXED, "prompts"))
    ).tolist()
    return [distinct[order[i % len(order)]] for i in range(count)]


def reference_of(
    images: ImageDataset, extractor: FeatureExtractor, *, digest: str, feature_resolution: int, device: torch.device
) -> ReferenceStats:
    """Reference statistics of real images, read from the cache if they exist there.

    Args:
        images: the real images.
        extractor: extracts their features.
        digest: digest of the extractor.
        feature_resolution: side in pixels that images are resized to before the extractor.
        device: device that the images are moved to.
    """
    key: dict[str, Any] = {
        "images": images.digest,
        "extractor": digest,
        "resolution": images.resolution,
        "feature_resolution": feature_resolution,
    }

    def feature_batches() -> Iterator[Tensor]:
        for batch in images.batches(ENCODE_BATCH_SIZE):
            yield extractor(batch.to(device), resolution=feature_resolution)

    return ReferenceStats.from_tensors(
        cached_tensors("reference", key, lambda: reference(feature_batches(), len(images)).tensors())
    )
