"""List of a forward pass's operations, traced on the meta device: the input of latency prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from archsearch.cost.meta_device import MetaTrace, aten, on_meta_device, storage_of, tensors
from snapgen.architecture.schema import Architecture

Kind = Literal["conv", "depthwise", "pointwise", "linear", "attention", "norm", "elementwise", "copy"]
"""Class of operations with similar performance; ``conv`` is a dense convolution larger than 1×1, ``copy`` only moves
data."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Operation(NamedTuple):
    """One operation of a forward pass. Sizes are in elements, so that they apply to every precision."""

    kind: Kind
    macs: int
    moved: int
    """Number of activations read and written; for attention including the score matrix, which softmax traverses."""
    weights: int
    shape: tuple[int, ...]
    """Shape of the output."""


def operations(arch: Architecture, latent_size: int, *, context_tokens: int = 77, batch: int = 1) -> list[Operation]:
    """Operations of a U-Net's forward pass; see `module_operations`.

    Args:
        arch: the architecture.
        latent_size: height and width of the latent; a multiple of ``arch.stride``.
        context_tokens: length of the context.
        batch: batch size, e.g. 2 for classifier-free guidance.

    Raises:
        InputError: if the architecture does not support a latent of that size.
    """
    arch.validate_latent_size(latent_size)
    return module_operations(*on_meta_device(arch, latent_size, context_tokens, batch=batch))


def module_operations(net: nn.Module, *inputs: Tensor) -> list[Operation]:
    """Operations of a module's forward pass, in order. The module and its inputs must be on the meta device.

    Views are excluded, and so are operations that do not depend on the inputs (tables of positions), which compilers
    fold into constants.
    """
    recorder = _Recorder(inputs)
    with torch.inference_mode(), recorder:
        net(*inputs)
    return recorder.operations


class _Recorder(MetaTrace):  # type: ignore[no-untyped-call]
    """Records every operation whose arguments depend on the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._computed = {storage_of(tensor) for tensor in inputs}

    def on_operation(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """See `MetaTrace.on_operation`."""
        read = [tensor for tensor in tensors(args) if storage_of(tensor) in self._computed]
        if not read or not outputs:
            return
        written = {storage_of(tensor) for tensor in outputs}
        if written.isdisjoint(map(storage_of, read)):  # otherwise a view
            self.operations.append(_operation(func, args, read, outputs[0]))
        self._computed |= written


_NORMS = {aten.group_norm.default, aten.layer_norm.default, aten.rms_norm.default}
_COPIES = {
    aten.cat.default,
    aten.upsample_nearest2d.vec,
    aten.contiguous.default,
    aten.clone.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.repeat_interleave.self_int,
}


def _operation(func: object, args: Sequence[Any], read: Sequence[Tensor], output: Tensor) -> Operation:
    assert func is not aten.matmul.default, "nets multiply activations only in attention"
    macs, scores = 0, 0
    if func is aten.conv2d.default:
        weight = args[1]
        kind: Kind = "depthwise" if weight.shape[1] == 1 else "pointwise" if weight[0, 0].numel() == 1 else "conv"
        macs = output.numel() * weight[0].numel()  # weight: (C_out, C_in / groups, kH, kW)
    elif func is aten.linear.default:
        kind, macs = "linear", output.numel() * args[1].shape[1]
    elif func is aten.scaled_dot_product_attention.default:
        queries, keys = args[:2]
        kind, scores = "attention", math.prod(queries.shape[:-1]) * keys.shape[-2]
        macs = scores * (queries.shape[-1] + output.shape[-1])  # QKᵀ and the product with V
    else:
        kind = "norm" if func in _NORMS else "copy" if func in _COPIES else "elementwise"
    moved = sum(tensor.numel() for tensor in read) + output.numel() + scores
    weights = sum(t.numel() for t in tensors(args) if isinstance(t, nn.Parameter))
    return Operation(kind, macs, moved, weights, tuple(output.shape))
