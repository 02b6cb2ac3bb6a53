"""What every candidate of a protocol shares: latents, contexts, prompts and the reference, computed once and cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from archsearch.protocol import Protocol, ResolvedProtocol
from archsearch.quality import feature_extractors as extractors
from archsearch.quality.distances import Reference, reference
from archsearch.quality.feature_extractors import Extractor
from archsearch.quality.resolve import SPLITS, resolve
from snapgen.autoencoders import autoencoder
from snapgen.autoencoders.autoencoder import Autoencoder
from snapgen.autoencoders.latents import BATCH, latents
from snapgen.conditioning import embeddings
from snapgen.data.dataset import Images
from snapgen.devices import fits
from snapgen.io.cache import cached
from snapgen.seeding import derive
from snapgen.training.short_run import LatentExamples

FIXED = 0
"""The seed of everything that all candidates of all studies share: prompts, sampling noise, validation pairs."""


@dataclass(frozen=True)
class Materials:
    """A protocol's data, ready on a device."""

    resolved: ResolvedProtocol
    training: LatentExamples
    validation: Tensor
    """Latents (pairs, C, H, W) of the held-out images behind the fixed pairs."""
    validation_context: Tensor
    """(pairs, tokens, width)."""
    prompts: list[str]
    """Captions of held-out concepts, one a sample."""
    prompt_context: Tensor
    """(samples, tokens, width)."""
    decoder: Autoencoder
    extractor: Extractor | None
    reference: Reference | None
    """Of the training images; None, as `extractor`, where the protocol draws no samples."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.validation.shape[1:]
        return channels, height, width


def prepare(protocol: Protocol, device: torch.device) -> Materials:
    """Read or compute all that a protocol needs.

    Raises:
        InputError: if the data, autoencoder, text encoder or extractor cannot be had, or do not fit together.
    """
    resolved, images = resolve(protocol)
    coder = autoencoder.load(protocol.autoencoder).to(device)
    train, held_out = (_examples(images[split], protocol, resolved, coder, device) for split in SPLITS)
    pairs = torch.arange(protocol.validation_pairs) * len(held_out) // protocol.validation_pairs
    validation, validation_context = held_out.batch(pairs)
    prompts = fixed_prompts(images["val"].captions, protocol.samples)
    extractor = extractors.load(protocol.extractor).to(device) if protocol.samples else None
    return Materials(
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
    images: Images, protocol: Protocol, resolved: ResolvedProtocol, coder: Autoencoder, device: torch.device
) -> LatentExamples:
    found = latents(images, coder, digest=resolved.autoencoder_digest, device=device)
    captions, rows = embeddings.distinct(images.captions)
    contexts = embeddings.embed(captions, name=protocol.text, tokens=protocol.context_tokens).tokens
    examples = LatentExamples(cast(Tensor, found), cast(Tensor, contexts), rows)
    return examples.to(device) if fits(examples.latents.nbytes + examples.contexts.nbytes, device) else examples


def fixed_prompts(captions: list[str], count: int) -> list[str]:
    """So many captions in a fixed shuffled order; again from the start, with other noise, where there are too few."""
    distinct = sorted(set(captions))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(derive(FIXED, "prompts"))).tolist()
    return [distinct[order[i % len(order)]] for i in range(count)]


def reference_of(
    images: Images, extractor: Extractor, *, digest: str, feature_resolution: int, device: torch.device
) -> Reference:
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

    return Reference.of_tensors(cached("reference", key, lambda: reference(rows(), len(images)).tensors()))
