"""Linear layers and pointwise convolutions, through the library that multiplies their matrices fastest.

On x86 torch gives float32 matrices to MKL, which leaves the widest instructions of processors that are not Intel's
unused, and so it does with pointwise convolutions on one thread. oneDNN, which torch carries too, uses them: on an AMD
EPYC with AVX-512 it takes half the time, forward and backward (``benchmarks/peers.py``). Elsewhere, under autocast and
in whatever is traced, compiled or exported these layers are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiply-adds from which a product gains more than the call costs: measured on one thread, forward and backward.
WORTHWHILE = 6_000_000
PRESENT = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """A linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inside) → (..., outside)."""
        return product(x, self.weight, self.bias) if _is_ours(x) else super().forward(x)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution: a linear layer of every place of a channels-last image."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) → (B, outside, H, W)."""
        if not _is_ours(x):
            return super().forward(x)
        return product(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of float32 on the CPU, through oneDNN where that is worth while."""
    if not PRESENT or x.numel() * weight.shape[0] < WORTHWHILE or x.dim() == 1 or weight.dtype is not x.dtype:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _through_onednn(x, weight, bias)


def _is_ours(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The one operation of torch that does so with tensors in the ordinary layout; its compiler uses it, too.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _through_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()  # a sum's is one number, expanded
        rows = gradient.flatten(0, -2)
        return (
            product(gradient, weight.t(), None) if for_x else None,
            _for_weight(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _for_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """gradientᵀ · x: (rows, outside), (rows, inside) → (outside, inside)."""
    rows, outside = gradient.shape
    inside = x.shape[1]
    # oneDNN copies a transposed first factor, which can take longer than the product: let it be the lesser copy.
    if rows * inside + inside * outside < rows * outside:
        return product(x.t(), gradient.t(), None).t().contiguous()
    return product(gradient.t(), x.t(), None)
