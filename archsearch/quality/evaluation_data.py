"""What every candidate of a protocol shares: latents, contexts, prompts and the reference, computed once and cached."""

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
from snapgen.autoencoders.latents import BATCH, encode_dataset
from snapgen.conditioning import embeddings
from snapgen.data.dataset import ImageDataset
from snapgen.devices import fits_on_device
from snapgen.io.cache import cached_tensors
from snapgen.seeding import derive_seed
from snapgen.training.short_run import LatentDataset

FIXED = 0
"""The seed of everything that all candidates of all studies share: prompts, sampling noise, validation pairs."""


@dataclass(frozen=True)
class EvaluationData:
    """A protocol's data, ready on a device."""

    resolved: ResolvedProtocol
    training: LatentDataset
    validation: Tensor
    """Latents (pairs, C, H, W) of the held-out images behind the fixed pairs."""
    validation_context: Tensor
    """(pairs, tokens, width)."""
    prompts: list[str]
    """Captions of held-out concepts, one a sample."""
    prompt_context: Tensor
    """(samples, tokens, width)."""
    decoder: Autoencoder
    extractor: FeatureExtractor | None
    reference: ReferenceStats | None
    """Of the training images; None, as `extractor`, where the protocol draws no samples."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.validation.shape[1:]
        return channels, height, width


def load_evaluation_data(protocol: EvaluationProtocol, device: torch.device) -> EvaluationData:
    """Read or compute all that a protocol needs.

    Raises:
        InputError: if the data, autoencoder, text encoder or extractor cannot be had, or do not fit together.
    """
    resolved, images = resolve(protocol)
    coder = autoencoder.load_autoencoder(protocol.autoencoder).to(device)
    train, held_out = (_examples(images[split], protocol, resolved, coder, device) for split in SPLITS)
    pairs = torch.arange(protocol.validation_pairs) * len(held_out) // protocol.validation_pairs
    validation, validation_context = held_out.batch(pairs)
    prompts = fixed_prompts(images["val"].captions, protocol.samples)
    extractor = feature_extractors.load_extractor(protocol.extractor).to(device) if protocol.samples else None
    return EvaluationData(
        resolved=resolved,
        training=train,
        validation=validation.to(device),
        validation_context=validation_context.to(device),
        prompts=prompts,
        prompt_context=embeddings.encode(prompts, name=protocol.text, tokens=protocol.context_tokens)
        .float()
        .to(device),
        decoder=coder,
        extractor=extractor,
        reference=None
        if extractor is None
        else reference_of(
            images["train"],
            extractor,
            digest=resolved.extractor_digest,
            feature_resolution=protocol.feature_resolution,
            device=device,
        ),
    )


def _examples(
    images: ImageDataset,
    protocol: EvaluationProtocol,
    resolved: ResolvedProtocol,
    coder: Autoencoder,
    device: torch.device,
) -> LatentDataset:
    found = encode_dataset(images, coder, digest=resolved.autoencoder_digest, device=device)
    captions, rows = embeddings.deduplicate(images.captions)
    contexts = embeddings.embed_captions(captions, name=protocol.text, tokens=protocol.context_tokens).tokens
    examples = LatentDataset(cast(Tensor, found), cast(Tensor, contexts), rows)
    return (
        examples.to(device) if fits_on_device(examples.latents.nbytes + examples.contexts.nbytes, device) else examples
    )


def fixed_prompts(captions: list[str], count: int) -> list[str]:
    """So many captions in a fixed shuffled order; again from the start, with other noise, where there are too few."""
    distinct = sorted(set(captions))
    order = torch.randperm(
        len(distinct), generator=torch.Generator().manual_seed(derive_seed(FIXED, "prompts"))
    ).tolist()
    return [distinct[order[i % len(order)]] for i in range(count)]


def reference_of(
    images: ImageDataset, extractor: FeatureExtractor, *, digest: str, feature_resolution: int, device: torch.device
) -> ReferenceStats:
    """The reference of real images, kept in the cache.

    Args:
        digest: the extractor's.
        feature_resolution: side in pixels that images are brought to before it.
    """
    key: dict[str, Any] = {
        "images": images.digest,
        "extractor": digest,
        "resolution": images.resolution,
        "feature_resolution": feature_resolution,
    }

    def rows() -> Iterator[Tensor]:
        for batch in images.batches(BATCH):
            yield extractor(batch.to(device), resolution=feature_resolution)

    return ReferenceStats.of_tensors(cached_tensors("reference", key, lambda: reference(rows(), len(images)).tensors()))
