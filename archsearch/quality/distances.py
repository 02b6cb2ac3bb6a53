"""Fréchet and kernel distance between two sets of features, each with its standard error.

The reference (real images) is fixed by the protocol, so errors include only the variance of the generated sample, which
is what matters for comparing candidates with a common reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.stats.estimate import DistanceEstimate

GROUPS = 32
"""Number of groups of the delete-a-group jackknife; smaller samples use one group per image."""

KERNEL_REFERENCES = 4096
"""Largest number of reference images used by the kernel distance, evenly spaced over the set."""


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
