"""Does an image show what its caption says? A text–image score that needs no CLIP.

A ridge regression from the images' features to their captions' sentence embeddings, fitted on the training images,
says which caption an image calls for; the score is how often that is its own among the captions of concepts that were
never trained on.
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

MOST = 20_000
"""Training images that are looked at: the first ones, which are a fair sample of the set."""
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the ridge, relative to the features' mean variance; one is chosen by cross-validation over training captions."""
FOLDS = 5
BATCH = 128
ROUNDING = 1e-6
"""Cosines as near as this are a tie."""
PLUS_FOUR = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
"""Two imaginary hits and misses (Agresti and Coull 1998), so that no hit among few concepts is not taken for never."""


class RetrievalRates(NamedTuple):
    """The three numbers of a retrieval, each in [0, 1]."""

    r1: float
    r10: float
    mrr: float


class RetrievalScore(Config):
    """How often images call for their own captions; every interval is over concepts and over seeds."""

    r1: Estimate
    """Share of the concepts whose own caption comes first."""
    r10: Estimate
    """Share of the concepts whose own caption is among the first ten."""
    mrr: Estimate
    """Mean of one over the rank of the own caption."""
    concepts: int = Field(ge=1)
    """Distinct captions, all of which stand to choice for every image."""
    images: int = Field(ge=1)
    """Of one seed."""
    protocol_hash: str = Field(min_length=1)
    """Of all that the numbers depend on beside the images; only equal ones may be compared."""

    @property
    def chance(self) -> RetrievalRates:
        """What guessing gives, on average."""
        ranks = 1 / torch.arange(1, self.concepts + 1, dtype=torch.float64)
        return RetrievalRates(1 / self.concepts, min(10, self.concepts) / self.concepts, float(ranks.mean()))


@dataclass(frozen=True)
class RidgeMap:
    """A linear map fitted with a penalty on its weights; float64."""

    mean: Tensor
    """(D,), of the features."""
    weight: Tensor
    """(D, W)."""
    centre: Tensor
    """(W,), of the targets."""

    @classmethod
    def fitted(cls, features: Tensor, targets: Tensor, strengths: Sequence[float]) -> list[Self]:
        """From features (N, D) and targets (N, W), one for each strength.

        Args:
            strengths: of the penalty, relative to the features' mean variance.
        """
        mean, centre = features.mean(0), targets.mean(0)
        rows = features - mean
        gram, cross = rows.T @ rows, rows.T @ (targets - centre)
        scale = gram.diagonal().mean()
        identity = torch.eye(len(gram), dtype=gram.dtype)
        factors = (torch.linalg.cholesky(gram + strength * scale * identity) for strength in strengths)
        return [cls(mean, torch.cholesky_solve(cross, factor), centre) for factor in factors]

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, W), how far from the targets' centre: what all captions share tells none from another."""
        return (features - self.mean) @ self.weight


def best_strength(features: Tensor, targets: Tensor, concept: Tensor) -> float:
    """The strength whose ridge ranks captions best that it was not fitted on (mean reciprocal rank).

    Args:
        features, targets: (N, D) and (N, W).
        concept: (N,) int64, from 0, none left out; images of one concept have one target and are held out together.
    """
    concepts = int(concept.max()) + 1
    order = torch.randperm(concepts, generator=torch.Generator().manual_seed(derive_seed(0, "retrieval", "folds")))
    fold, place = order % FOLDS, order // FOLDS  # of each concept: its fold, and its place therein
    captions = torch.empty(concepts, targets.shape[1], dtype=targets.dtype)
    captions[order[concept]] = targets

    reciprocal = torch.zeros(len(STRENGTHS), dtype=torch.float64)
    for held in range(FOLDS):
        out = fold[concept] == held
        for index, ridge in enumerate(RidgeMap.fitted(features[~out], targets[~out], STRENGTHS)):
            found = ranks(ridge(features[out]), captions[held::FOLDS] - ridge.centre, place[concept[out]])
            reciprocal[index] += (1 / found.double()).sum()
    return STRENGTHS[int(reciprocal.argmax())]


def ranks(found: Tensor, captions: Tensor, own: Tensor) -> Tensor:
    """Each image's rank of its own caption by cosine, from 1; captions that tie with it come before it.

    Args:
        found: (N, W), the images' embeddings.
        captions: (C, W), those of all captions, from the same centre.
        own: (N,) int64, each image's caption.
    """
    cosine = functional.normalize(found, dim=1) @ functional.normalize(captions, dim=1).T
    return (cosine > cosine.gather(1, own[:, None]) - ROUNDING).sum(1)


def sentences(captions: Sequence[str], *, encoder: str = text_encoder.MINILM, tokens: int = 16) -> Tensor:
    """Captions as unit vectors (N, W) float64: the mean of their tokens' embeddings."""
    return functional.normalize(embeddings.encode(captions, name=encoder, tokens=tokens).double().sum(1), dim=1)


@dataclass(frozen=True)
class Retriever:
    """Judges images by the captions that they call for."""

    ridge: RidgeMap
    extractor: FeatureExtractor
    resolution: int
    """Side in pixels at which features are taken."""
    encoder: str
    tokens: int
    key: str
    """Everything that this depends on, as JSON."""

    @classmethod
    def fitted(
        cls,
        train: ImageDataset,
        *,
        resolution: int = 128,
        extractor: str = EFFICIENTNET,
        encoder: str = text_encoder.MINILM,
        tokens: int = 16,
        device: torch.device | None = None,
    ) -> Self:
        """Fitted on training images, or read from the cache (80 s for 3,333 at 128 px on one thread).

        Args:
            train: of the resolution of the images that will be judged: how blurred they are is seen in the features.
            resolution: side in pixels that images are brought to for their features.
            tokens: captions are cut to so many.

        Raises:
            InputError: if there are too few captions, or the extractor or encoder cannot be had.
        """
        captions, concept = _distinct(train.captions[:MOST])
        if len(captions) < FOLDS:
            problem = f"has {len(captions)} different captions; a retriever needs {FOLDS} or more"
            raise InputError(train.name, problem, "name a set of captioned images")
        key: dict[str, cache.JSON] = {
            "images": train.digest,
            "side": train.resolution,
            "extractor": feature_extractors.digest(extractor),
            "resolution": resolution,
            "encoder": text_encoder.digest(encoder),
            "tokens": tokens,
            "version": 1,
        }
        net = feature_extractors.load_extractor(extractor).to(device or torch.device("cpu"))

        def fit() -> dict[str, Tensor]:
            features = _features(train, net, resolution)
            targets = sentences(captions, encoder=encoder, tokens=tokens)[concept]
            [ridge] = RidgeMap.fitted(features, targets, [best_strength(features, targets, concept)])
            return vars(ridge)

        ridge = RidgeMap(**cache.cached_tensors("retrieval", key, fit))
        return cls(ridge, net, resolution, encoder, tokens, json.dumps(key, sort_keys=True))

    def score(self, images: Tensor | Sequence[Tensor], captions: Sequence[str]) -> RetrievalScore:
        """How often images call for their own captions among all of ``captions``.

        Args:
            images: uint8 (N, 3, H, W), of any device; or one such tensor a seed.
            captions: one an image, of concepts that are not among the training images; a caption may have several
                images, which count as one concept.
        """
        distinct, own = _distinct(captions)
        known = sentences(distinct, encoder=self.encoder, tokens=self.tokens) - self.ridge.centre
        sets = [images] if isinstance(images, Tensor) else list(images)
        found = torch.stack([ranks(self._embedded(one), known, own) for one in sets])
        return tally(found, own, protocol_hash=self._hash(distinct))

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How near each image comes to its own caption, from what all captions share: (N,) float64 in [-1, 1].

        Args:
            images, captions: as `score`; of one image a caption.
        """
        distinct, own = _distinct(captions)
        known = sentences(distinct, encoder=self.encoder, tokens=self.tokens) - self.ridge.centre
        return functional.cosine_similarity(self._embedded(images), known[own], dim=1)

    def _embedded(self, images: Tensor) -> Tensor:
        return self.ridge(self.extractor(images, resolution=self.resolution).double().cpu())

    def _hash(self, captions: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.key, *captions]).encode()).hexdigest()[:16]


def tally(found: Tensor, own: Tensor, *, protocol_hash: str) -> RetrievalScore:
    """The rates from ranks (seeds, N), of images whose concepts are ``own`` (N,)."""
    measures = ((found <= 1).double(), (found <= 10).double(), 1 / found.double())
    r1, r10, mrr = (_estimate(_by_concept(each, own)) for each in measures)
    concepts = int(own.max()) + 1
    return RetrievalScore(
        r1=r1, r10=r10, mrr=mrr, concepts=concepts, images=found.shape[1], protocol_hash=protocol_hash
    )


def _by_concept(values: Tensor, own: Tensor) -> Tensor:
    """(seeds, N) → the mean of each concept's images (seeds, concepts)."""
    total = torch.zeros(len(values), int(own.max()) + 1, dtype=values.dtype).index_add(1, own, values)
    return total / own.bincount()


def _estimate(table: Tensor) -> Estimate:
    """The mean of a table (seeds, concepts) in [0, 1] with its interval, for other concepts and other seeds."""
    by_concept = table.mean(0)
    within = float(torch.cat([by_concept, PLUS_FOUR]).var()) / len(by_concept)
    found = intervals.mean_over_seeds(table.mean(1).tolist(), within, within_freedom=max(1, len(by_concept) - 1))
    return found.model_copy(update={"low": max(0.0, found.low), "high": min(1.0, found.high)})


def _features(images: ImageDataset, extractor: FeatureExtractor, resolution: int) -> Tensor:
    """Features (≤ MOST, D) float64 on the CPU."""
    device = next(extractor.net.parameters()).device
    found: list[Tensor] = []
    for batch in images.batches(BATCH):
        found.append(extractor(batch.to(device), resolution=resolution).cpu())
        if len(found) * BATCH >= MOST:
            break
    return torch.cat(found)[:MOST].double()


def _distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The different captions, sorted, and which of them each one is (N,)."""
    distinct = sorted(set(captions))
    number = {caption: index for index, caption in enumerate(distinct)}
    return distinct, torch.tensor([number[caption] for caption in captions])
