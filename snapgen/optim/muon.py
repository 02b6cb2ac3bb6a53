"""Muon: momentum whose every matrix is made orthogonal before it is a step (Jordan et al. 2024; arXiv 2502.16982).

torch has a Muon that takes one matrix at a time; in a small net most of its time goes into starting operations. This
one takes all matrices of a shape as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic iteration, chosen for speed: singular values end between about 0.7 and 1.2."""
ITERATIONS = 5
TOGETHER = 1 << 17
"""Numbers of the Gram matrices that the CPU iterates at once: half a megabyte, which its cache holds."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a step's root mean square is ``0.2 × lr``, AdamW's usual one.

    Args:
        params: matrices, or tensors seen as (first dimension, all others) in the order they lie in memory; dense.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # Set where gradients are watched (torch's own name): 1 if any is not finite, and nothing may change.
            bad: Tensor | None = getattr(self, "found_inf", None)
            taken: Tensor | float = 1.0 if bad is None else 1 - bad
            updates = self._momentum(params, group["momentum"], bad)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * taken)
            for (_, longer), members in _by_shape(updates).items():
                steps = orthogonal(torch.stack([_wide(updates[i]) for i in members])) * -(
                    group["lr"] * 0.2 * longer**0.5 * taken
                )
                for index, step in zip(members, steps, strict=True):
                    matrix = _as_matrix(params[index], params[index])
                    matrix.add_(step if matrix.shape == step.shape else step.mT)

    def _momentum(self, params: list[Tensor], momentum: float, bad: Tensor | None) -> list[Tensor]:
        """Each parameter's Nesterov momentum, as a matrix."""
        gradients = [_as_matrix(p.grad, p) for p in params if p.grad is not None]
        if bad is not None:
            gradients = [gradient.where(bad == 0, 0) for gradient in gradients]
        for param, gradient in zip(params, gradients, strict=True):
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(gradient)
        buffers = [self.state[param]["momentum"] for param in params]
        if bad is None:
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        else:
            torch._foreach_lerp_(buffers, gradients, [(1 - bad) * (1 - momentum)] * len(buffers))
        return list(torch._foreach_lerp(gradients, buffers, momentum))


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows: (K, n, m) → (K, n, m), n ≤ m.

    Every iterate is a polynomial of the first one's Gram matrix times it, so wide matrices are iterated in n×n:
    x ← p(g)·x and g ← p(g)·g·p(g) with g = x·xᵀ, the product of all p(g) multiplied by x once, at the end.
    """
    assert matrices.shape[1] <= matrices.shape[2]
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # In bfloat16 the Gram matrix would lose what the iteration is to raise.
    wide = 2 * x.shape[1] <= x.shape[2] and x.dtype == torch.float32
    iterated = _in_gram if wide else _in_place
    if x.device.type != "cpu":
        return iterated(x).to(matrices.dtype)
    return torch.cat([iterated(part) for part in x.split(max(1, TOGETHER // x.shape[1] ** 2))])


def _in_place(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _in_gram(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product: Tensor | None = None
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < ITERATIONS:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


def _by_shape(matrices: list[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Indices of the matrices of each shape, whichever way they stand."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        shorter, longer = sorted(matrix.shape)
        found.setdefault((shorter, longer), []).append(index)
    return found


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _as_matrix(tensor: Tensor, param: Tensor) -> Tensor:
    """(out, …) → (out, everything else), the latter in the order in which it lies in ``param``'s memory."""
    if not param.is_contiguous():  # channels last
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1)
