from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from archsearch.quality import distances
from archsearch.quality.distances import ReferenceStats, frechet, kernel, reference


def sampled(count: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / width**0.5
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ (mixing + 0.5 * torch.eye(width)) * scale + shift


def made(rows: Tensor, batch: int = 37) -> ReferenceStats:
    return reference(rows.split(batch), len(rows))


def by_square_root(a: Tensor, b: Tensor) -> float:
    """The textbook form, with a general matrix square root."""
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def test_reference_is_the_mean_and_covariance_whatever_the_batches() -> None:
    rows = sampled(500, 8, 0, shift=1000.0)
    for batch in (7, 500):
        found = made(rows, batch)
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-12)


def test_reference_keeps_evenly_spread_features_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "KERNEL_REFERENCES", 10)
    rows = torch.arange(37, dtype=torch.float64).view(-1, 1)
    assert made(rows, 5).features.flatten().tolist() == list(range(0, 37, 4))


def test_reference_survives_storing() -> None:
    first = made(sampled(50, 6, 0))
    second = ReferenceStats.from_tensors(first.tensors())
    rows = sampled(20, 6, 1)
    assert frechet(rows, second) == frechet(rows, first)
    assert kernel(rows, second).value == pytest.approx(kernel(rows, first).value, rel=1e-6)


def frechet_gaussians(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians (arXiv 1706.08500, equation 6)."""
    values, vectors = torch.linalg.eigh(covariance_a.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_b.double() @ root).clamp(min=0)
    mean_distance = (mean_a.double() - mean_b.double()).square().sum()
    return float(
        mean_distance + covariance_a.double().trace() + covariance_b.double().trace() - 2 * eigenvalues.sqrt().sum()
    )


@pytest.mark.parametrize("count", [20, 60, 400], ids=["fewer than features", "as many", "more"])
def test_frechet_is_the_textbook_form(count: int) -> None:
    real, fake = sampled(900, 60, 0), sampled(count, 60, 1, shift=0.2, scale=1.3)
    expected = by_square_root(fake, real)
    assert frechet(fake, made(real)).value == pytest.approx(expected, rel=1e-6)
    mean, covariance = fake.mean(0), torch.cov(fake.T)
    symmetric = frechet_gaussians(mean, covariance, real.mean(0), torch.cov(real.T))
    assert symmetric == pytest.approx(expected, rel=1e-6)


def test_frechet_of_known_gaussians() -> None:
    one, two = torch.eye(3), 4 * torch.eye(3)
    assert frechet_gaussians(torch.zeros(3), one, torch.ones(3), one) == pytest.approx(3)
    assert frechet_gaussians(torch.zeros(3), one, torch.zeros(3), two) == pytest.approx(3)  # (2 − 1)² a dimension
    diagonal = torch.diag(torch.tensor([1.0, 9.0, 0.0]))
    assert frechet_gaussians(torch.zeros(3), diagonal, torch.zeros(3), one) == pytest.approx(0 + 4 + 1)


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    rows = sampled(300, 10, 0)
    assert frechet(rows, made(rows)).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("measure", [frechet, kernel])
def test_distances_grow_with_noise_and_with_shift(measure) -> None:  # type: ignore[no-untyped-def]
    real = made(sampled(600, 16, 0))
    base = sampled(100, 16, 1)
    noise = torch.randn(100, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noisy = [measure(base + level * noise, real).value for level in (0, 1, 2, 3)]
    shifted = [measure(base + level, real).value for level in (0, 1, 2, 3)]
    assert noisy == sorted(noisy)
    assert shifted == sorted(shifted)


def test_kernel_is_the_plain_double_sum() -> None:
    real, fake = sampled(30, 5, 0), sampled(12, 5, 1)

    def similarity(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    def within(rows: Tensor) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(similarity(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    across = sum(similarity(a, b) for a in fake for b in real) / (len(fake) * len(real))
    expected = within(fake) + within(real) - 2 * across
    assert kernel(fake, made(real)).value == pytest.approx(expected, rel=1e-5)


def test_kernel_is_unbiased_where_frechet_is_not() -> None:
    """Small samples of the reference's own distribution: zero on average, within three standard errors."""
    real = made(sampled(3000, 12, 0))
    kernels = torch.tensor([kernel(sampled(16, 12, 10 + i), real).value for i in range(200)])
    error = float(kernels.std()) / len(kernels) ** 0.5
    assert abs(float(kernels.mean())) < 3 * error + 0.01 * float(kernels.std())
    assert min(frechet(sampled(16, 12, 10 + i), real).value for i in range(50)) > 1


@pytest.mark.parametrize(("measure", "slack"), [(frechet, 0.35), (kernel, 0.3)])
def test_the_error_is_the_spread_over_samples(measure, slack: float) -> None:  # type: ignore[no-untyped-def]
    real = made(sampled(3000, 40, 0))
    found = [measure(sampled(128, 40, 100 + i, shift=0.3), real) for i in range(60)]
    spread = float(torch.tensor([one.value for one in found]).std())
    stated = float(torch.tensor([one.error for one in found]).mean())
    assert stated == pytest.approx(spread, rel=slack)


def test_many_features_are_quick() -> None:
    """The Gram form: 256 images of 1280 features must not cost 33 decompositions of 1280×1280."""
    real = ReferenceStats(
        mean=torch.zeros(1280, dtype=torch.float64),
        covariance=torch.eye(1280, dtype=torch.float64),
        features=torch.zeros(2, 1280, dtype=torch.float64),
        similarity=1.0,
    )
    rows = torch.randn(256, 1280, generator=torch.Generator().manual_seed(0))
    value = frechet(rows, real).value
    covariance = torch.cov(rows.double().T)
    expected = frechet_gaussians(rows.double().mean(0), covariance, real.mean, real.covariance)
    assert value == pytest.approx(expected, rel=1e-6)
