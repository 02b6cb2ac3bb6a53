"""Tracing of forward passes on the meta device, which computes shapes but no values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet

aten = torch.ops.aten

MAX_RESULTS = 20_000
_RESULTS: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
"""Shape, strides and type of operations' results by the signatures of their arguments.

Nets repeat their layers, and a space's nets those of each other; most of a pass would be spent inferring the same
shapes again.
"""


def on_meta_device(
    arch: Architecture, latent_size: int, context_tokens: int, *, batch: int = 1
) -> tuple[UNet, Tensor, Tensor, Tensor]:
    """A U-Net and its inputs (sample, timestep, context) on the meta device."""
    with torch.device("meta"):
        sample = torch.empty(batch, arch.latent_channels, latent_size, latent_size)
        return UNet(arch).eval(), sample, torch.empty(batch), torch.empty(batch, context_tokens, arch.context_dim)


class MetaTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts every operation of a pass on the meta device; subclasses handle them in `on_operation`.

    Use under ``torch.inference_mode()``, where composite operations are not decomposed: attention is one operation
    without a score matrix.
    """

    def on_operation(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """Handle an operation, given its arguments and the tensors that it returned."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._result(func, args, kwargs or {})
        permutes = func is aten.einsum.default and len(args[1]) == 1  # einsum of a single tensor only permutes axes
        assert permutes or func not in UNCOUNTED, f"{func} multiplies matrices and has no MAC formula"
        self.on_operation(func, args, tensors(result))
        return result

    def _result(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Result of the operation, cached by the signature of its arguments."""
        if func is aten.scaled_dot_product_attention.default:
            queries, _, values = args[:3]
            return queries.new_empty(*queries.shape[:-1], values.shape[-1])
        key = func, _signature(args), _signature(kwargs.items())
        if key in _RESULTS:
            size, stride, dtype = _RESULTS[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        result = func(*args, **kwargs)
        inputs = {storage_of(value) for value in [*args, *kwargs.values()] if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and storage_of(result) not in inputs:  # views must keep sharing their storage
            if len(_RESULTS) >= MAX_RESULTS:
                _RESULTS.clear()
            _RESULTS[key] = result.shape, result.stride(), result.dtype
        return result


UNCOUNTED = {
    op.default for op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum, aten.conv1d, aten.conv_transpose1d)
}
"""Products without a MAC formula. No net uses them; one that does fails an assertion instead of being undercounted."""


def tensors(value: object) -> list[Tensor]:
    """All tensors in possibly nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple | list) else []


def _signature(value: Any) -> Hashable:
    """The properties of an operation's arguments that determine the shape of its result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return type(value), value
    return tuple(map(_signature, value))


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """Weak reference to a tensor's storage: equal for tensors that share memory, without keeping the memory alive."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
