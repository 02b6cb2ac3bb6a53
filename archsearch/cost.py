"""Exact cost of an architecture: params, MACs and activation memory, from the meta device, without weights.

fvcore's formulas count the MACs. Its own tracer (`torch.jit.trace`) is not used: on the meta device it records no
convolution under torch 2.13, and it takes several times as long as the single pass here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from archsearch.score import Cost
from snapgen.arch import Architecture
from snapgen.unet import UNet

BYTES = 2  # an activation's element in fp16, as phones run it

aten = torch.ops.aten


def cost(arch: Architecture, latent_size: int, *, context_tokens: int = 77) -> Cost:
    """What one forward pass at batch 1 needs; see `module_cost`.

    Args:
        arch: the architecture.
        latent_size: height and width of the latent; a multiple of ``arch.stride``.
        context_tokens: length of the context.
    """
    with torch.device("meta"):
        net = UNet(arch).eval()
        sample = torch.empty(1, arch.latent_channels, latent_size, latent_size)
        return module_cost(net, sample, torch.empty(1), torch.empty(1, context_tokens, arch.context_width))


def module_cost(net: nn.Module, *inputs: Tensor) -> Cost:
    """What a forward pass of a module and its inputs needs, both on the meta device.

    MACs are those of convolutions, linear layers and attention. Activation memory is the peak of live operations'
    outputs in fp16, each kept until its last use, with fused attention; inputs and weights are not in it.
    """
    counter = _Counter([*net.parameters(), *net.buffers(), *inputs])
    # In inference mode composite operations arrive whole: attention as one, without its matrix of scores.
    with torch.inference_mode(), counter:
        net(*inputs)
    params = sum(parameter.numel() for parameter in net.parameters())
    return Cost(params=params, macs=counter.macs, activation_bytes=counter.peak)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up MACs and follows the memory of operations' outputs; views cost nothing, nor what was ``there`` before."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = self.peak = 0
        self._handles = _handles()
        self._there = {_reference(tensor) for tensor in there}
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.scaled_dot_product_attention.default:
            queries, _, values = args[:3]
            result = queries.new_empty(*queries.shape[:-1], values.shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        outputs = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        assert func not in UNCOUNTED, f"{func} multiplies matrices and has no handle"
        if func in self._handles:
            self.macs += int(self._handles[func](args, outputs))
        self._remember(outputs)
        return result

    def _remember(self, outputs: Sequence[Tensor]) -> None:
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}  # type: ignore[no-untyped-call]
        for tensor in outputs:
            if (reference := _reference(tensor)) not in self._there:
                self._live.setdefault(reference, tensor.untyped_storage().nbytes() // tensor.element_size() * BYTES)
        self.peak = max(self.peak, sum(self._live.values()))


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


Handle = Callable[[Sequence[Any], Sequence[Tensor]], float]

# What inference mode leaves of other products, should a net come to use them.
UNCOUNTED = {
    op.default for op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum, aten.conv1d, aten.conv_transpose1d)
}


def _handles() -> dict[object, Handle]:
    """MACs of an operation from its arguments and outputs."""
    from fvcore.nn import jit_handles

    def sizes(values: Sequence[Any]) -> list[Any]:
        return [_Sized(list(value.shape)) if isinstance(value, Tensor) else value for value in values]

    def conv(args: Sequence[Any], outputs: Sequence[Tensor]) -> float:
        return float(jit_handles.conv_flop_count(args[0].shape, args[1].shape, outputs[0].shape))

    def linear(args: Sequence[Any], outputs: Sequence[Tensor]) -> float:
        return float(jit_handles.linear_flop_jit(sizes(args), sizes(outputs)))

    def matmul(args: Sequence[Any], outputs: Sequence[Tensor]) -> float:
        return float(jit_handles.matmul_flop_jit(sizes(args), sizes(outputs)))

    return {
        aten.conv2d.default: conv,
        aten.linear.default: linear,
        aten.matmul.default: matmul,
        aten.scaled_dot_product_attention.default: _attention,
    }


class _Sized(NamedTuple):
    """A tensor as fvcore's handles expect it: a value of a traced graph that knows its sizes."""

    shape: list[int]

    def isCompleteTensor(self) -> bool:
        return True

    def type(self) -> _Sized:
        return self

    def sizes(self) -> list[int]:
        return self.shape


def _attention(args: Sequence[Any], outputs: Sequence[Tensor]) -> float:  # noqa: ARG001 - a handle
    """softmax(QKᵀ)V of sizes (…, N, D), (…, M, D), (…, M, E): N·M·(D + E) a head; fvcore has no handle for it."""
    queries, _, values = (value.shape for value in args[:3])
    return float(math.prod(queries[:-1]) * values[-2] * (queries[-1] + values[-1]))
