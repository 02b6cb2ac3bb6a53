"""Distances in the space of image features: between two sets of images, and of images to their nearest training images.

The reference (real images) of the Fréchet and kernel distance is fixed by the protocol, so errors include only the
variance of the generated sample, which is what matters for comparing candidates with a common reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from archsearch.quality.feature_extractors import FeatureExtractor
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen.data.dataset import ImageDataset
from snapgen.data.pixels import INFERENCE_BATCH_SIZE, grid, to_uint8
from snapgen.data.sources import Split
from snapgen.io.cache import JSON, cached_tensors
from snapgen.training.data import TrainingData

GROUPS = 32
"""Number of groups of the delete-a-group jackknife; smaller samples use one group per image."""

KERNEL_REFERENCES = 4096
"""Largest number of reference images used by the kernel distance, evenly spaced over the set."""

COPY_QUANTILE = 0.05
"""Fraction of held-out real images that count as copies."""
MAX_IMAGES = 20_000
"""Largest number of training images that are searched; the first ones."""
MAX_HELDOUT_IMAGES = 1024
"""Largest number of held-out images that the threshold is found from; evenly spaced over the split."""


@dataclass(frozen=True)
class ReferenceStats:
    """Statistics of the real images that the distances need; float64 on the CPU."""

    mean: Tensor
    """Mean of the features, (D,)."""
    covariance: Tensor
    """Unbiased covariance of the features, (D, D)."""
    features: Tensor
    """Features of at most `KERNEL_REFERENCES` images, (M, D)."""
    similarity: float
    """Mean kernel between two different images of ``features``."""

    def tensors(self) -> dict[str, Tensor]:
        """The statistics as named tensors for storage; features in float32."""
        return {
            "mean": self.mean,
            "covariance": self.covariance,
            "features": self.features.float(),
            "similarity": torch.tensor([self.similarity], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ReferenceStats:
        """Statistics from the result of `tensors`."""
        return cls(
            mean=tensors["mean"],
            covariance=tensors["covariance"],
            features=tensors["features"].double(),
            similarity=float(tensors["similarity"]),
        )


def reference(batches: Iterable[Tensor], count: int) -> ReferenceStats:
    """Statistics of ``count`` feature vectors in batches (B, D), with memory independent of the number of batches."""
    stride = max(1, -(-count // KERNEL_REFERENCES))
    total, mean, scatter, subset = 0, torch.zeros(()), torch.zeros(()), []
    for batch in batches:
        rows = batch.double().cpu()
        subset.append(rows[-total % stride :: stride].float())
        # Parallel update of mean and scatter (Chan et al.): avoids the cancellation of a sum of squares.
        total += len(rows)
        batch_mean = rows.mean(0)
        shift = batch_mean - mean
        centered = rows - batch_mean
        scatter = (
            scatter + centered.T @ centered + torch.outer(shift, shift) * (len(rows) * (total - len(rows)) / total)
        )
        mean = mean + shift * (len(rows) / total)
    assert total == count > 1, f"{total} rows of {count}"
    features = torch.cat(subset).double()
    gram = _kernel(features, features)  # (M, D) -> (M, M)
    num_pairs = len(features) * (len(features) - 1)
    return ReferenceStats(mean, scatter / (total - 1), features, float((gram.sum() - gram.trace()) / num_pairs))


def frechet(features: Tensor, real: ReferenceStats) -> DistanceEstimate:
    """Squared Fréchet distance of features (N, D) to the reference, with a delete-a-group jackknife standard error.

    The estimate is biased upwards for small N (by about 1 / N); compare only estimates with equal N.
    """
    rows = features.double().cpu()
    # The non-zero eigenvalues of Σ^½ AᵀA Σ^½ (D, D) are those of AΣAᵀ (N, N), which is much smaller for few images, and
    # whose submatrices belong to subsets of the images. With many images, each subset needs a (D, D) decomposition, so
    # there are fewer groups.
    few = len(rows) <= rows.shape[1]
    groups = torch.arange(len(rows)) % min(GROUPS if few else GROUPS // 4, len(rows))
    gram = rows @ real.covariance @ rows.T if few else torch.empty(0)
    root = torch.empty(0) if few else _sqrt(real.covariance)

    def distance(keep_mask: Tensor) -> float:
        subset = rows[keep_mask]
        mean = subset.mean(0)
        trace = (subset - mean).square().sum() / (len(subset) - 1)
        if few:
            inner = _center_gram(gram[keep_mask][:, keep_mask]) / (len(subset) - 1)
        else:
            inner = root @ torch.cov(subset.T) @ root
        # ‖μ_a - μ_b‖² + tr Σ_a + tr Σ_b - 2 tr √(Σ_a Σ_b)
        cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
        traces = trace + real.covariance.trace()
        return float(((mean - real.mean).square().sum() + traces - 2 * cross).clamp(min=0))

    left_out = [distance(groups != group) for group in range(int(groups.max()) + 1)]
    error = _jackknife_error(torch.tensor(left_out, dtype=torch.float64))
    return DistanceEstimate(distance(groups >= 0), error, len(left_out) - 1)


def _sqrt(covariance: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def kernel(features: Tensor, real: ReferenceStats) -> DistanceEstimate:
    """Unbiased squared kernel distance (KID, arXiv 1801.01401) with the kernel (x·y / D + 1)³ over all images.

    The standard error is that of the leave-one-image-out jackknife, computed exactly from row sums. A bootstrap would
    be biased upwards, because it compares images that are drawn twice with themselves. The estimate may be negative.
    """
    rows = features.double().cpu()
    count = len(rows)
    gram = _kernel(rows, rows)  # (N, N)
    to_others = gram.sum(1) - gram.diagonal()  # (N,)
    to_real = _kernel(rows, real.features).mean(1)  # (N, M) -> (N,)

    def distance(within: Tensor, cross: Tensor, n: int) -> Tensor:
        return within / (n * (n - 1)) - 2 * cross / n + real.similarity

    value = distance(to_others.sum(), to_real.sum(), count)
    left_out = distance(to_others.sum() - 2 * to_others, to_real.sum() - to_real, count - 1)
    return DistanceEstimate(float(value), _jackknife_error(left_out), count - 1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _center_gram(gram: Tensor) -> Tensor:
    """Gram matrix of centered rows, from the Gram matrix of the rows."""
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _jackknife_error(left_out: Tensor) -> float:
    """Jackknife standard error from the estimates that leave out one group each, (groups,)."""
    groups = len(left_out)
    return float(((groups - 1) / groups * (left_out - left_out.mean()).square().sum()).sqrt())


class Nearest(NamedTuple):
    """The training image that is nearest to each of N images."""

    distances: Tensor
    """Euclidean distance of their features, (N,) float32."""
    indices: Tensor
    """Index of the training image, (N,) int64."""


def nearest(features: Tensor, train: Tensor) -> Nearest:
    """Nearest of the training features (T, D) to each of the features (N, D)."""
    return Nearest(*torch.cdist(features.float().cpu(), train).min(1))


@dataclass(frozen=True)
class MemorizationCheck:
    """Compares samples with the training images of a net.

    A sample counts as a copy if it is closer to a training image than nearly all held-out real images are. Of real
    images `COPY_QUANTILE` are that close, so that is the rate of a net that copies nothing.

    Attributes:
        images: the training images.
        train: their features as the autoencoder decodes them, (T, D) float32.
        threshold: distance to the nearest training image below which an image counts as a copy.
        examples: held-out images as the autoencoder decodes them, (M, 3, H, W) uint8, the nearest to a training image
            first.
        example_index: index of the training image nearest to each of them, (M,).
    """

    images: ImageDataset
    train: Tensor
    threshold: float
    examples: Tensor
    example_index: Tensor

    @classmethod
    def prepared(
        cls,
        trained_on: TrainingData,
        heldout: TrainingData,
        resolution: int,
        extractor: FeatureExtractor,
        *,
        extractor_digest: str,
        feature_resolution: int,
        examples: int,
    ) -> Self:
        """Extract the features of the training images, or read them from the cache, and find the threshold.

        All real images are encoded and decoded first: samples come from the autoencoder, whose blur alone is farther
        than the threshold.

        Args:
            trained_on: data whose training images the nets are trained on.
            heldout: data whose held-out images set the threshold.
            resolution: height and width of the images, in pixels.
            extractor: the feature extractor.
            extractor_digest: digest of its weights.
            feature_resolution: side in pixels that images are resized to before the extractor.
            examples: number of held-out images to keep as examples.
        """

        def features(data: TrainingData, split: Split, indices: Tensor) -> Tensor:
            batches = _decoded(data, split, resolution, indices)
            return torch.cat([extractor(images, resolution=feature_resolution).cpu() for images in batches])

        images = trained_on.images("train", resolution)
        key: dict[str, JSON] = {
            "images": images.digest,
            "autoencoder": trained_on.autoencoder_digest,
            "resolution": resolution,
            "extractor": extractor_digest,
            "feature_resolution": feature_resolution,
            "count": MAX_IMAGES,
        }
        first = torch.arange(min(len(images), MAX_IMAGES))
        train = cached_tensors("features", key, lambda: {"features": features(trained_on, "train", first)})["features"]
        count = len(heldout.images("val", resolution))
        spread = torch.arange(min(count, MAX_HELDOUT_IMAGES)) * count // min(count, MAX_HELDOUT_IMAGES)
        found = nearest(features(heldout, "val", spread), train)
        order = found.distances.argsort()[:examples]
        threshold = float(found.distances.double().quantile(COPY_QUANTILE))
        closest = torch.cat(list(_decoded(heldout, "val", resolution, spread[order])))
        return cls(images, train, threshold, closest, found.indices[order])

    def copied(self, features: Tensor) -> Estimate:
        """Fraction of samples that are copies, from their features (N, D)."""
        return intervals.rate_estimate((nearest(features, self.train).distances < self.threshold).double()[None])

    def comparison(self, samples: Tensor, features: Tensor, columns: int) -> Tensor:
        """Samples above their nearest training images, and below them the examples above theirs: (3, H, W) uint8.

        Args:
            samples: (N, 3, H, W) uint8.
            features: their features, (N, D).
            columns: images in a row.
        """
        index = nearest(features, self.train).indices
        rows = []
        for images, found in ((samples, index), (self.examples, self.example_index)):
            for start in range(0, len(images), columns):
                part = slice(start, start + columns)
                rows += [_padded(images[part], columns), _padded(self._training_images(found[part]), columns)]
        return grid(torch.cat(rows), len(rows), columns)

    def _training_images(self, index: Tensor) -> Tensor:
        return torch.stack([next(iter(self.images.batches(1, start=int(i))))[0] for i in index])


@torch.no_grad()
def _decoded(data: TrainingData, split: Split, resolution: int, indices: Tensor) -> Iterator[Tensor]:
    """Yield batches of images of a split as the autoencoder decodes them: (≤ B, 3, H, W) uint8."""
    latents = data.encoded(split, resolution).latents
    for batch in torch.split(indices, INFERENCE_BATCH_SIZE):
        yield to_uint8(data.autoencoder.decode(latents[batch].float().to(data.device))).cpu()


def _padded(images: Tensor, count: int) -> Tensor:
    """The images, followed by white ones up to ``count``."""
    return torch.cat([images, images.new_full((count - len(images), *images.shape[1:]), 255)])
