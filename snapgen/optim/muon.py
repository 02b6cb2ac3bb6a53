"""The Muon optimizer, which orthogonalizes the momentum of every matrix (Jordan et al. 2024; arXiv 2502.16982).

torch's own Muon processes one matrix at a time, which for a small net is mostly overhead. This one batches all matrices
of the same height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (
    (8.300667, -24.037544, 17.466134),
    (4.003387, -2.92284, 0.541871),
    (3.470862, -2.549404, 0.500204),
    (2.490116, -1.834275, 0.436835),
)
"""Coefficients (a, b, c) of each iteration x ← a·x + (b·x·xᵀ + c·(x·xᵀ)²)·x, by the Polar Express (arXiv 2505.16932).

Each is the best odd quintic on the interval that holds the singular values by then, [0.003, 1] at first. They end
between 0.78 and 1.2; five iterations with Jordan's coefficients leave them between 0.68 and 1.2. All but the last allow
for singular values that rounding has made 1 % too large.
"""
SMALLEST_NORM = 1e-7
"""Smaller Frobenius norms are not divided by."""
GRAM_CHUNK_SIZE = 1 << 17
"""Elements of the Gram matrices that the CPU iterates at once: half a megabyte, which fits its cache."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized. A step has the root mean square ``0.2 × lr``, which is typical of AdamW.

    Args:
        params: matrices, or tensors treated as (first dimension, all others) in their memory order.
        lr: learning rate.
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # torch's gradient scaler sets found_inf to 1 if a gradient is not finite; the step then changes nothing.
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            is_finite: Tensor | float = 1.0 if found_inf is None else 1 - found_inf
            updates = self._momentum(params, group["momentum"], found_inf)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * is_finite)
            for by_shape in _by_height(updates):
                stacks = [torch.stack([_wide(updates[i]) for i in members]) for members in by_shape]
                # An orthogonal (n, m) matrix, n ≤ m, has the root mean square 1/√m, so that √m·0.2 makes it 0.2.
                scales = [-(group["lr"] * 0.2 * stack.shape[2] ** 0.5 * is_finite) for stack in stacks]
                steps = [step for stack in scaled_orthogonal(stacks, scales) for step in stack]
                members = [params[i] for members in by_shape for i in members]
                torch._foreach_add_([_wide(_as_matrix(param, param)) for param in members], steps)

    def _momentum(self, params: list[Tensor], momentum: float, found_inf: Tensor | None) -> list[Tensor]:
        """Nesterov momentum of each parameter, as a matrix."""
        gradients = [_as_matrix(p.grad, p) for p in params if p.grad is not None]
        if found_inf is not None:
            gradients = [gradient.where(found_inf == 0, 0) for gradient in gradients]
        for param, gradient in zip(params, gradients, strict=True):
            if not self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(gradient)
        buffers = [self.state[param]["momentum"] for param in params]
        if found_inf is None:
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        else:
            torch._foreach_lerp_(buffers, gradients, [(1 - found_inf) * (1 - momentum)] * len(buffers))
        return list(torch._foreach_lerp(gradients, buffers, momentum))


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows: (K, n, m) → (K, n, m), n ≤ m."""
    return scaled_orthogonal([matrices], [1.0])[0]


def scaled_orthogonal(stacks: list[Tensor], scales: Sequence[float | Tensor]) -> list[Tensor]:
    """`orthogonal` of stacks of matrices of equal n, each stack with its own m and times its own scale.

    Each iterate is a polynomial in the Gram matrix g = x·xᵀ times x. Wide matrices are therefore iterated in n×n, by
    x ← p(g)·x and g ← p(g)·g·p(g), and the product of all p(g) is multiplied with the first x once, at the end. All are
    iterated together, whatever their m: most matrices of a small net are so small that every operation on them is
    mostly overhead.
    """
    results = {i: _orthogonal_narrow(x) * scales[i] for i, x in enumerate(stacks) if not _is_wide(x)}
    wide = {i: x for i, x in enumerate(stacks) if i not in results}
    if wide:
        grams = torch.cat([x @ x.mT for x in wide.values()])
        # The trace of a matrix's Gram matrix is the square of its norm.
        norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=SMALLEST_NORM).view(-1, 1, 1)
        products = _in_chunks(_iterate_gram, grams / norms.square()) / norms
        by_stack = torch.split_with_sizes(products, [len(x) for x in wide.values()])
        for (i, x), product in zip(wide.items(), by_stack, strict=True):
            results[i] = (product * scales[i]) @ x
    return [results[i] for i in range(len(stacks))]


def _is_wide(x: Tensor) -> bool:
    """Whether matrices are iterated in their Gram matrix.

    On CUDA they are in bfloat16, in which the Gram matrix would lose the small singular values that the iteration is
    meant to raise.
    """
    return 2 * x.shape[1] <= x.shape[2] and x.dtype == torch.float32 and x.device.type != "cuda"


def _orthogonal_narrow(matrices: Tensor) -> Tensor:
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    return _in_chunks(_iterate, x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)).to(matrices.dtype)


def _in_chunks(iterate: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """``iterate`` of (K, n, m) matrices, on the CPU of so many at a time as its cache holds."""
    if matrices.device.type != "cpu":
        return iterate(matrices)
    chunks = torch.split(matrices, max(1, GRAM_CHUNK_SIZE // matrices.shape[1] ** 2))
    return torch.cat([iterate(chunk) for chunk in chunks]) if len(chunks) > 1 else iterate(matrices)


def _iterate(x: Tensor) -> Tensor:
    """Newton–Schulz: x ← a·x + (b·g + c·g²)·x with g = x·xᵀ."""
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(gram: Tensor) -> Tensor:
    """The same iteration on the Gram matrix, with p(g) = a·I + b·g + c·g² in ``factor``: the product of all p(g)."""
    product: Tensor | None = None
    for iteration, (a, b, c) in enumerate(NEWTON_SCHULZ, 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration < len(NEWTON_SCHULZ):
            gram = factor @ gram @ factor
    assert product is not None
    return product


def _by_height(matrices: list[Tensor]) -> list[list[list[int]]]:
    """Indices of the matrices by the shorter side, then by shape; a matrix and its transpose have the same shape."""
    indices: dict[int, dict[int, list[int]]] = {}
    for index, matrix in enumerate(matrices):
        height, width = sorted(matrix.shape)
        indices.setdefault(height, {}).setdefault(width, []).append(index)
    return [list(by_width.values()) for by_width in indices.values()]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _as_matrix(tensor: Tensor, param: Tensor) -> Tensor:
    """(out, …) → (out, all other dimensions), which are flattened in ``param``'s memory order."""
    if param.ndim == 2:
        return tensor
    if not param.is_contiguous():  # channels last
        tensor = tensor.permute(0, 2, 3, 1)  # (out, in, h, w) -> (out, h, w, in)
    return tensor.reshape(len(tensor), -1)
