"""The Muon optimizer, which orthogonalizes the momentum of every matrix (Jordan et al. 2024; arXiv 2502.16982).

torch's own Muon processes one matrix at a time, which for a small net is mostly overhead. This one batches all matrices
of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of the quintic iteration, chosen for speed: singular values end between about 0.7 and 1.2."""
ITERATIONS = 5
"""Newton–Schulz iterations of a step."""
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
            by_shape = _by_shape(updates)
            stacks = orthogonal_stacks([torch.stack([_wide(updates[i]) for i in members]) for members in by_shape])
            for members, stack in zip(by_shape, stacks, strict=True):
                # An orthogonal (n, m) matrix, n ≤ m, has the root mean square 1/√m, so that √m·0.2 makes it 0.2.
                stack.mul_(-(group["lr"] * 0.2 * stack.shape[2] ** 0.5 * is_finite))
                for index, step in zip(members, stack.unbind(), strict=True):
                    updates[index] = step if updates[index].shape == step.shape else step.mT
            torch._foreach_add_([_as_matrix(param, param) for param in params], updates)

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
    return orthogonal_stacks([matrices])[0]


def orthogonal_stacks(stacks: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of stacks of matrices of different shapes.

    Each iterate is a polynomial in the Gram matrix g = x·xᵀ times x. Wide matrices are therefore iterated in n×n, by
    x ← p(g)·x and g ← p(g)·g·p(g), and the product of all p(g) is multiplied with the first x once, at the end. Those
    of equal n are iterated together, whatever their m: most matrices of a small net are so small that every operation
    on them is mostly overhead.
    """
    normalized = [_normalized(matrices) for matrices in stacks]
    wide: dict[int, list[int]] = {}
    results: dict[int, Tensor] = {}
    for index, x in enumerate(normalized):
        # In bfloat16 the Gram matrix would lose the small singular values that the iteration is meant to raise.
        if 2 * x.shape[1] <= x.shape[2] and x.dtype == torch.float32:
            wide.setdefault(x.shape[1], []).append(index)
        else:
            results[index] = _in_chunks(_iterate, x)
    for indices in wide.values():
        grams = [normalized[index] @ normalized[index].mT for index in indices]
        products = _in_chunks(_iterate_gram, torch.cat(grams)).split([len(gram) for gram in grams])
        results |= {index: product @ normalized[index] for index, product in zip(indices, products, strict=True)}
    return [results[index].to(matrices.dtype) for index, matrices in enumerate(stacks)]


def _normalized(matrices: Tensor) -> Tensor:
    """The matrices with a Frobenius norm of one, in the dtype of the iteration."""
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    return x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)


def _in_chunks(iterate: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """``iterate`` of (K, n, m) matrices, on the CPU of so many at a time as its cache holds."""
    if matrices.device.type != "cpu":
        return iterate(matrices)
    chunks = matrices.split(max(1, GRAM_CHUNK_SIZE // matrices.shape[1] ** 2))
    return torch.cat([iterate(chunk) for chunk in chunks]) if len(chunks) > 1 else iterate(matrices)


def _iterate(x: Tensor) -> Tensor:
    """Newton–Schulz: x ← a·x + (b·g + c·g²)·x with g = x·xᵀ."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(gram: Tensor) -> Tensor:
    """The same iteration on the Gram matrix, with p(g) = a·I + b·g + c·g² in ``factor``: the product of all p(g)."""
    a, b, c = NEWTON_SCHULZ
    product: Tensor | None = None
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < ITERATIONS:
            gram = factor @ gram @ factor
    assert product is not None
    return product


def _by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Indices of the matrices of each shape, where a matrix and its transpose have the same shape."""
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        indices.setdefault(tuple(sorted(matrix.shape)), []).append(index)
    return list(indices.values())


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _as_matrix(tensor: Tensor, param: Tensor) -> Tensor:
    """(out, …) → (out, all other dimensions), which are flattened in ``param``'s memory order."""
    if param.ndim == 2:
        return tensor
    if not param.is_contiguous():  # channels last
        tensor = tensor.permute(0, 2, 3, 1)  # (out, in, h, w) -> (out, h, w, in)
    return tensor.reshape(len(tensor), -1)
