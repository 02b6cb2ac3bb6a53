"""Tests that the optimizers' shortcuts compute what torch computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from snapgen.optim import muon
from snapgen.optim.optimizers import AdamW, clip_gradients

SHAPES = [(3,), (5, 4), (2, 3, 3, 3)]


def params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def draw_gradients(weights: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return gradients


def test_adamw_is_torchs_to_the_last_bit() -> None:
    ours, theirs = params(), params()
    makers = (AdamW, torch.optim.AdamW)
    optimizers = [make(p, lr=0.1, weight_decay=0.1, fused=True) for make, p in zip(makers, (ours, theirs), strict=True)]
    for step in range(6):
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            draw_gradients(weights, step)
            if step == 3:
                weights[0].grad = None  # a block that is left out of a step has no gradients
            optimizer.found_inf = torch.tensor(float(step == 4))  # type: ignore[union-attr]
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    steps = [
        [float(optimizer.state[p]["step"]) for p in optimizer.param_groups[0]["params"]] for optimizer in optimizers
    ]
    assert steps == [[4, 5, 5]] * 2


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_is_torchs_to_the_last_bit(max_norm: float) -> None:
    weights = params()
    gradients = [gradient.clone() for gradient in draw_gradients(weights, 0)]
    expected = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    assert torch.equal(clip_gradients(gradients, max_norm), expected)
    assert all(p.grad is not None and torch.equal(g, p.grad) for g, p in zip(gradients, weights, strict=True))


def test_a_gradient_that_is_not_finite_has_such_a_norm() -> None:
    assert not clip_gradients([torch.tensor([1.0, math.nan]), torch.ones(2)], 1.0).isfinite()


def test_matrices_of_one_height_are_orthogonalized_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(shape, generator=generator) for shape in [(2, 24, 30), (3, 24, 48), (1, 24, 200)]]
    together = muon.scaled_orthogonal(stacks, [1.0, -2.0, torch.tensor(0.5)])
    for stack, scale, found in zip(stacks, (1.0, -2.0, 0.5), together, strict=True):
        torch.testing.assert_close(found, scale * muon.orthogonal(stack))


def test_small_singular_values_are_raised() -> None:
    left, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(100, 40, generator=torch.Generator().manual_seed(1)))
    values = torch.logspace(-2, 0, 40)
    matrix = (left * values) @ right.T
    for matrices in (matrix[None], (left * values)[None]):
        raised = torch.linalg.svdvals(muon.orthogonal(matrices))
        assert 0.75 < float(raised.min()) <= float(raised.max()) < 1.25
