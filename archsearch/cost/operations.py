"""What a forward pass does, operation by operation, from the meta device: what a latency can be predicted from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from archsearch.cost.meta_device import MetaTrace, aten, on_meta_device, storage_of, tensors
from snapgen.architecture.schema import Architecture

Kind = Literal["conv", "depthwise", "pointwise", "linear", "attention", "norm", "elementwise", "copy"]
"""What runs alike on a device; ``conv`` is a dense convolution wider than 1×1, ``copy`` moves and does not compute."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Operation(NamedTuple):
    """One operation of a forward pass. Sizes are in elements, so that they hold in every precision."""

    kind: Kind
    macs: int
    moved: int
    """Activations read and written; of attention its matrix of scores too, which is exponentiated one by one."""
    weights: int
    shape: tuple[int, ...]
    """Of its output."""


def operations(arch: Architecture, latent_size: int, *, context_tokens: int = 77, batch: int = 1) -> list[Operation]:
    """Those of a U-Net's forward pass; see `module_operations`.

    Args:
        arch: the architecture.
        latent_size: height and width of the latent; a multiple of ``arch.stride``.
        context_tokens: length of the context.
        batch: nets at once, e.g. 2 for guidance.

    Raises:
        InputError: if the architecture does not take a latent of that size.
    """
    arch.check_latent(latent_size)
    return module_operations(*on_meta_device(arch, latent_size, context_tokens, batch=batch))


def module_operations(net: nn.Module, *inputs: Tensor) -> list[Operation]:
    """Those of a module's forward pass, both on the meta device, in their order.

    Left out: views, and what depends on no input (tables of positions), which every compiler folds into a constant.
    """
    recorder = _Recorder(inputs)
    with torch.inference_mode(), recorder:
        net(*inputs)
    return recorder.operations


class _Recorder(MetaTrace):  # type: ignore[no-untyped-call]
    """Keeps every operation on what came from the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._computed = {storage_of(tensor) for tensor in inputs}

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """See `MetaTrace.see`."""
        read = [tensor for tensor in tensors(args) if storage_of(tensor) in self._computed]
        if not read or not outputs:
            return
        made = {storage_of(tensor) for tensor in outputs}
        if made.isdisjoint(map(storage_of, read)):
            self.operations.append(_operation(func, args, read, outputs[0]))
        self._computed |= made


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
    assert func is not aten.matmul.default, "no net of ours multiplies activations but in attention"
    macs, scores = 0, 0
    if func is aten.conv2d.default:
        weight = args[1]
        kind: Kind = "depthwise" if weight.shape[1] == 1 else "pointwise" if weight[0, 0].numel() == 1 else "conv"
        macs = output.numel() * weight[0].numel()
    elif func is aten.linear.default:
        kind, macs = "linear", output.numel() * args[1].shape[1]
    elif func is aten.scaled_dot_product_attention.default:
        queries, keys = args[:2]
        kind, scores = "attention", math.prod(queries.shape[:-1]) * keys.shape[-2]
        macs = scores * (queries.shape[-1] + output.shape[-1])
    else:
        kind = "norm" if func in _NORMS else "copy" if func in _COPIES else "elementwise"
    moved = sum(tensor.numel() for tensor in read) + output.numel() + scores
    weights = sum(t.numel() for t in tensors(args) if isinstance(t, nn.Parameter))
    return Operation(kind, macs, moved, weights, tuple(output.shape))
