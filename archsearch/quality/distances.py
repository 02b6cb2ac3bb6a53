"""Distances between two sets of features, each with the standard error that its finite sample leaves.

The *reference* (real images) is a fixed part of the protocol: errors are those of the generated sample alone, which is
what tells two candidates apart that share a reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.stats.estimate import DistanceEstimate

GROUPS = 32
"""Of the delete-a-group jackknife; a sample of fewer images is deleted one by one."""


KERNEL_REFERENCES = 4096
"""Reference images that the kernel distance looks at, evenly spread over the set; all, if there are fewer."""


@dataclass(frozen=True)
class ReferenceStats:
    """What the distances need to know of the real images; float64 on the CPU."""

    mean: Tensor
    """(D,)."""
    covariance: Tensor
    """(D, D), unbiased."""
    features: Tensor
    """(M, D) of at most `KERNEL_REFERENCES` images."""
    similarity: float
    """Mean kernel between two different ones of ``features``."""

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, to be stored; features in float32."""
        return {
            "mean": self.mean,
            "covariance": self.covariance,
            "features": self.features.float(),
            "similarity": torch.tensor([self.similarity], dtype=torch.float64),
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> ReferenceStats:
        """From what `tensors` gave."""
        return cls(
            mean=tensors["mean"],
            covariance=tensors["covariance"],
            features=tensors["features"].double(),
            similarity=float(tensors["similarity"]),
        )


def reference(batches: Iterable[Tensor], count: int) -> ReferenceStats:
    """The reference of ``count`` feature rows that come in batches (B, D); memory does not grow with their number."""
    stride = max(1, -(-count // KERNEL_REFERENCES))
    total, mean, scatter, kept = 0, torch.zeros(()), torch.zeros(()), []
    for batch in batches:
        rows = batch.double().cpu()
        kept.append(rows[-total % stride :: stride].float())
        # Chan's update: exact where a sum of squares would cancel.
        total += len(rows)
        here = rows.mean(0)
        shift = here - mean
        centred = rows - here
        scatter = scatter + centred.T @ centred + torch.outer(shift, shift) * (len(rows) * (total - len(rows)) / total)
        mean = mean + shift * (len(rows) / total)
    assert total == count > 1, f"{total} rows of {count}"
    features = torch.cat(kept).double()
    gram = _kernel(features, features)
    others = len(features) * (len(features) - 1)
    return ReferenceStats(mean, scatter / (total - 1), features, float((gram.sum() - gram.trace()) / others))


def frechet_gaussians(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians (arXiv 1706.08500, equation 6), float64.

    Symmetric form: tr √(Σ_a Σ_b) is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric, so
    they are real and what is negative among them is rounding.
    """
    root = _root(covariance_a.double())
    inner = root @ covariance_b.double() @ root
    apart = (mean_a.double() - mean_b.double()).square().sum()
    return _frechet(apart, covariance_a.double().trace() + covariance_b.double().trace(), inner)


def frechet(features: Tensor, real: ReferenceStats) -> DistanceEstimate:
    """Squared Fréchet distance of features (N, D) to the reference, with a delete-a-group jackknife error.

    The estimate is biased upwards for small N (by about 1 / N); compare only equal N.
    """
    rows = features.double().cpu()
    # The eigenvalues of Σ^½ AᵀA Σ^½ that are not zero are those of AΣAᵀ, which for few images is far smaller, and of
    # which every subset is a submatrix. With many images each subset costs a D×D decomposition: fewer groups.
    few = len(rows) <= rows.shape[1]
    groups = torch.arange(len(rows)) % min(GROUPS if few else GROUPS // 4, len(rows))
    gram = rows @ real.covariance @ rows.T if few else torch.empty(0)
    root = torch.empty(0) if few else _root(real.covariance)

    def distance(kept: Tensor) -> float:
        some = rows[kept]
        mean = some.mean(0)
        covered = (some - mean).square().sum() / (len(some) - 1)
        inner = _doubly_centred(gram[kept][:, kept]) / (len(some) - 1) if few else root @ torch.cov(some.T) @ root
        return _frechet((mean - real.mean).square().sum(), covered + real.covariance.trace(), inner)

    left_out = [distance(groups != group) for group in range(int(groups.max()) + 1)]
    return DistanceEstimate(distance(groups >= 0), _jackknife_error(torch.tensor(left_out, dtype=torch.float64)))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _frechet(apart: Tensor, traces: Tensor, inner: Tensor) -> float:
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    return float((apart + traces - 2 * cross).clamp(min=0))


def kernel(features: Tensor, real: ReferenceStats) -> DistanceEstimate:
    """Unbiased squared kernel distance (KID, arXiv 1801.01401): polynomial kernel (x·y / D + 1)³, all images at once.

    The error is the jackknife's (one image left out at a time, exactly, from row sums): a bootstrap would count an
    image drawn twice as its own neighbour and push the estimate up. May be below zero.
    """
    rows = features.double().cpu()
    count = len(rows)
    own = _kernel(rows, rows)
    to_others = own.sum(1) - own.diagonal()
    to_real = _kernel(rows, real.features).mean(1)

    def distance(pairs: Tensor, reals: Tensor, n: int) -> Tensor:
        return pairs / (n * (n - 1)) - 2 * reals / n + real.similarity

    value = distance(to_others.sum(), to_real.sum(), count)
    left_out = distance(to_others.sum() - 2 * to_others, to_real.sum() - to_real, count - 1)
    return DistanceEstimate(float(value), _jackknife_error(left_out))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _doubly_centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _jackknife_error(left_out: Tensor) -> float:
    """Standard error from the estimates that each leave one part of the sample out."""
    parts = len(left_out)
    return float(((parts - 1) / parts * (left_out - left_out.mean()).square().sum()).sqrt())
