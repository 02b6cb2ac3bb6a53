"""Linear layers, pointwise and depthwise convolutions that use oneDNN well for float32 on the CPU.

On x86, torch multiplies float32 matrices with MKL, which does not use the widest instructions of processors other than
Intel's; the same holds for pointwise convolutions on one thread. oneDNN, which torch includes, uses them: on an AMD
EPYC with AVX-512 it takes half the time, forward and backward (``benchmarks/peers.py``). In all other cases, under
autocast, and when traced, compiled or exported, these layers are torch's own.

Without AVX-512 oneDNN computes the weights' gradient of a depthwise convolution of 2×2 pixels with its reference, which
takes 30 to 60 times as long as that of 3×3 (``benchmarks/depthwise.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

# Multiply-adds from which oneDNN gains more than its call costs: measured on one thread, forward and backward.
MIN_MACS = 6_000_000
AVAILABLE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """Linear layer; ``nn.Linear`` apart from its use of oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        return linear(x, self.weight, self.bias) if _is_eligible(x) else super().forward(x)


class Pointwise(nn.Conv2d):
    """1×1 convolution, computed as a linear layer over the pixels of a channels-last feature map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W)."""
        if not _is_eligible(x):
            return super().forward(x)
        # (B, C, H, W) → (B, H, W, C) → (B, H, W, C') → (B, C', H, W); the weights are (C', C, 1, 1) → (C', C)
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """3×3 depthwise convolution with a padding of 1 and no bias."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, 3, stride, 1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ⌈H / stride⌉, ⌈W / stride⌉)."""
        is_small = min(x.shape[2:]) < 3 and self.stride == (1, 1)
        if is_small and torch.is_grad_enabled() and _is_eligible(x):
            return _SmallDepthwise.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` for float32 on the CPU, through oneDNN if the product is large enough to gain from it."""
    if not AVAILABLE or x.numel() * weight.shape[0] < MIN_MACS or x.dim() == 1 or weight.dtype is not x.dtype:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _onednn_linear(x, weight, bias)


def _is_eligible(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The only torch operator that calls oneDNN on tensors in the ordinary layout; torch.compile uses it, too.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()  # the gradient of a sum is one number, expanded
        rows = gradient.flatten(0, -2)  # (…, out) → (rows, out)
        return (
            linear(gradient, weight.t(), None) if needs_x else None,
            _weight_gradient(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


class _SmallDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        # Zeros below and to the right, up to 3×3, add nothing to the weights' gradient.
        to_3x3 = (0, max(0, 3 - x.shape[3]), 0, max(0, 3 - x.shape[2]))
        return (
            _depthwise_input_gradient(gradient, x, weight) if needs_x else None,
            conv2d_weight(  # type: ignore[no-untyped-call]
                F.pad(x, to_3x3), weight.shape, F.pad(gradient, to_3x3), padding=1, groups=x.shape[1]
            )
            if needs_weight
            else None,
        )


def _depthwise_input_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input; ``torch.nn.grad.conv2d_input`` takes twice as long, since it knows no memory format."""
    ones, wanted = [1, 1], [True, False, False]
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        gradient, x, weight, None, ones, ones, ones, False, [0, 0], x.shape[1], wanted
    )[0]


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradientᵀ · x: (rows, out_features), (rows, in_features) → (out_features, in_features)."""
    rows, out_features = gradient.shape
    in_features = x.shape[1]
    # oneDNN copies a transposed first factor, which can take longer than the product: choose the smaller copy.
    if rows * in_features + in_features * out_features < rows * out_features:
        return linear(x.t(), gradient.t(), None).t().contiguous()
    return linear(gradient.t(), x.t(), None)
