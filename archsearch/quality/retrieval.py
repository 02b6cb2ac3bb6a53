"""Text–image alignment by caption retrieval, without CLIP.

A ridge regression, fitted on the training images, maps image features to the sentence embedding of the caption. The
score is how often the predicted embedding retrieves an image's own caption among the captions of held-out concepts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from archsearch.quality import feature_extractors
from archsearch.quality.feature_extractors import EFFICIENTNET, FeatureExtractor
from archsearch.stats import intervals
from archsearch.stats.estimate import Estimate
from snapgen.conditioning import embeddings, text_encoder
from snapgen.config import Config
from snapgen.data.dataset import ImageDataset
from snapgen.errors import InputError
from snapgen.io import cache
from snapgen.seeding import derive_seed

MAX_IMAGES = 20_000
"""Largest number of training images used; the first ones, which are a fair sample of the set."""

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge penalties relative to the features' mean variance; one is chosen by cross-validation over training captions."""

FOLDS = 5
"""Number of cross-validation folds."""

BATCH_SIZE = 128
"""Number of images whose features are extracted at once."""

TOKENS = 16
"""Largest number of tokens of a caption."""

ROUNDING = 1e-6
"""Cosines that differ by less than this are ties."""


class RetrievalRates(NamedTuple):
    """Rates of a retrieval: recall at 1, recall at 10 and mean reciprocal rank, each in [0, 1]."""

    r1: float
    r10: float
    mrr: float


class RetrievalScore(Config):
    """Retrieval of captions by images; intervals cover the choice of concepts and of seeds."""

    r1: Estimate
    """Recall at 1: fraction of the concepts whose own caption ranks first."""
    r10: Estimate
    """Recall at 10: fraction of the concepts whose own caption is among the first ten."""
    mrr: Estimate
    """Mean reciprocal rank of the own caption."""
    concepts: int = Field(ge=1)
    """Number of distinct captions that every image is compared with."""
    images: int = Field(ge=1)
    """Number of images per seed."""
    protocol_hash: str = Field(min_length=1)
    """Hash of everything that the rates depend on except the images; only rates with equal hashes are comparable."""

    @property
    def chance(self) -> RetrievalRates:
        """Expected rates of a random ranking."""
        ranks = 1 / torch.arange(1, self.concepts + 1, dtype=torch.float64)
        return RetrievalRates(1 / self.concepts, min(10, self.concepts) / self.concepts, float(ranks.mean()))


@dataclass(frozen=True)
class RidgeMap:
    """Linear map fitted by ridge regression; float64."""

    mean: Tensor
    """Mean of the features, (D,)."""
    weight: Tensor
    """Weights, (D, W)."""
    centre: Tensor
    """Mean of the targets, (W,)."""

    @classmethod
    def fitted(cls, features: Tensor, targets: Tensor, strengths: Sequence[float]) -> list[Self]:
        """Fit one map for each penalty strength.

        Args:
            features: (N, D).
            targets: (N, W).
            strengths: penalties relative to the features' mean variance.
        """
        mean, centre = features.mean(0), targets.mean(0)
        rows = features - mean
        gram, cross = rows.T @ rows, rows.T @ (targets - centre)
        scale = gram.diagonal().mean()
        # ridge solution (XᵀX + λI)⁻¹ XᵀY for each λ
        identity = torch.eye(len(gram), dtype=gram.dtype)
        factors = (torch.linalg.cholesky(gram + strength * scale * identity) for strength in strengths)
        return [cls(mean, torch.cholesky_solve(cross, factor), centre) for factor in factors]

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (N, D) to targets relative to their mean, (N, W); the mean does not affect rankings."""
        return (features - self.mean) @ self.weight


def best_strength(features: Tensor, targets: Tensor, concept: Tensor) -> float:
    """Penalty strength with the best cross-validated mean reciprocal rank.

    Args:
        features: (N, D).
        targets: (N, W).
        concept: concept of each image, (N,) int64 without gaps from 0; images of a concept share their target and are
            held out together.
    """
    concepts = int(concept.max()) + 1
    order = torch.randperm(concepts, generator=torch.Generator().manual_seed(derive_seed(0, "retrieval", "folds")))
    fold, index_in_fold = order % FOLDS, order // FOLDS  # for each concept
    captions = torch.empty(concepts, targets.shape[1], dtype=targets.dtype)
    captions[order[concept]] = targets

    reciprocal = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    for heldout_fold in range(FOLDS):
        heldout = fold[concept] == heldout_fold
        for i, ridge in enumerate(RidgeMap.fitted(features[~heldout], targets[~heldout], STRENGTHS)):
            candidates = captions[heldout_fold::FOLDS] - ridge.centre
            heldout_ranks = ranks(ridge(features[heldout]), candidates, index_in_fold[concept[heldout]])
            reciprocal[i] += (1 / heldout_ranks.double()).sum()
    return STRENGTHS[int(reciprocal.argmax())]


def ranks(image_embeds: Tensor, caption_embeds: Tensor, own: Tensor) -> Tensor:
    """Rank of each image's own caption by cosine similarity, (N,) from 1; tied captions rank before it.

    Args:
        image_embeds: embeddings predicted from the images, (N, W).
        caption_embeds: embeddings of all captions relative to the same mean, (C, W).
        own: index of each image's caption, (N,) int64.
    """
    cosine = functional.normalize(image_embeds, dim=1) @ functional.normalize(caption_embeds, dim=1).T  # (N, C)
    return (cosine > cosine.gather(1, own[:, None]) - ROUNDING).sum(1)


def sentences(captions: Sequence[str], encoder: str = text_encoder.MINILM) -> Tensor:
    """Sentence embeddings of captions as unit vectors (N, W) float64: normalized sums of their token embeddings."""
    return functional.normalize(embeddings.encode(captions, name=encoder, tokens=TOKENS).double().sum(1), dim=1)


@dataclass(frozen=True)
class Retriever:
    """Scores images by the captions that they retrieve."""

    ridge: RidgeMap
    extractor: FeatureExtractor
    resolution: int
    """Side in pixels that images are resized to for feature extraction."""
    encoder: str
    key: str
    """Everything that the retriever depends on, as JSON."""

    @classmethod
    def fitted(
        cls,
        train: ImageDataset,
        *,
        resolution: int = 128,
        encoder: str = text_encoder.MINILM,
        device: torch.device | None = None,
    ) -> Self:
        """Fit a retriever to training images, or read it from the cache (80 s for 3,333 images on one thread).

        Args:
            train: training images, of the same resolution as the images to score, because features depend on blur.
            resolution: side in pixels that images are resized to for feature extraction.
            encoder: name of the text encoder.
            device: device of the feature extractor; None: the CPU.

        Raises:
            InputError: if there are too few captions, or the encoder cannot be loaded.
        """
        captions, concept = embeddings.deduplicate(train.captions[:MAX_IMAGES])
        if len(captions) < FOLDS:
            problem = f"has {len(captions)} different captions; a retriever needs {FOLDS} or more"
            raise InputError(train.name, problem, "name a set of captioned images, or leave retrieval out")
        key: dict[str, cache.JSON] = {
            "images": train.digest,
            "side": train.resolution,
            "extractor": feature_extractors.digest(EFFICIENTNET),
            "resolution": resolution,
            "encoder": text_encoder.digest(encoder),
            "tokens": TOKENS,
            "version": 1,
        }
        net = feature_extractors.load_extractor(EFFICIENTNET).to(device or torch.device("cpu"))

        def fit() -> dict[str, Tensor]:
            features = _features(train, net, resolution)
            targets = sentences(captions, encoder)[concept]
            [ridge] = RidgeMap.fitted(features, targets, [best_strength(features, targets, concept)])
            return vars(ridge)

        ridge = RidgeMap(**cache.cached_tensors("retrieval", key, fit))
        return cls(ridge, net, resolution, encoder, json.dumps(key, sort_keys=True))

    def score(self, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> RetrievalScore:
        """Retrieval rates of images among all of ``captions``.

        Args:
            images: (N, 3, H, W) uint8 on any device, or one such tensor per seed.
            captions: caption of each image, of concepts that are not in the training images; images with the same
                caption count as one concept.
        """
        distinct, own = embeddings.deduplicate(captions)
        caption_embeds = sentences(distinct, self.encoder) - self.ridge.centre
        sets = [images] if isinstance(images, Tensor) else list(images)
        image_ranks = torch.stack([ranks(self._embed(images), caption_embeds, own) for images in sets])
        return tally(image_ranks, own, protocol_hash=self._hash(distinct))

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarity of each image and its caption, relative to the mean caption: (N,) float64 in [-1, 1].

        Args:
            images: (N, 3, H, W) uint8 on any device.
            captions: caption of each image.
        """
        distinct, own = embeddings.deduplicate(captions)
        caption_embeds = sentences(distinct, self.encoder) - self.ridge.centre
        return functional.cosine_similarity(self._embed(images), caption_embeds[own], dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        return self.ridge(self.extractor(images, resolution=self.resolution).double().cpu())

    def _hash(self, captions: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.key, *captions]).encode()).hexdigest()[:16]


def tally(image_ranks: Tensor, own: Tensor, *, protocol_hash: str) -> RetrievalScore:
    """Retrieval rates from ranks (seeds, N) of images with the concepts ``own``, (N,)."""
    values = ((image_ranks <= 1).double(), (image_ranks <= 10).double(), 1 / image_ranks.double())
    r1, r10, mrr = (intervals.rate_estimate(_by_concept(value, own)) for value in values)
    concepts = int(own.max()) + 1
    return RetrievalScore(
        r1=r1, r10=r10, mrr=mrr, concepts=concepts, images=image_ranks.shape[1], protocol_hash=protocol_hash
    )


def _by_concept(values: Tensor, own: Tensor) -> Tensor:
    """Mean over the images of each concept: (seeds, N) → (seeds, concepts)."""
    total = torch.zeros(len(values), int(own.max()) + 1, dtype=values.dtype).index_add(1, own, values)
    return total / own.bincount()


def _features(images: ImageDataset, extractor: FeatureExtractor, resolution: int) -> Tensor:
    """Features of at most `MAX_IMAGES` images, (N, D) float64 on the CPU."""
    device = next(extractor.net.parameters()).device
    features: list[Tensor] = []
    for batch in images.batches(BATCH_SIZE):
        features.append(extractor(batch.to(device), resolution=resolution).cpu())
        if len(features) * BATCH_SIZE >= MAX_IMAGES:
            break
    return torch.cat(features)[:MAX_IMAGES].double()
