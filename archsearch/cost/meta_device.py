"""Forward passes on the meta device: every shape, no values, and none of the work."""

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


def on_meta_device(
    arch: Architecture, latent_size: int, context_tokens: int, *, batch: int = 1
) -> tuple[UNet, Tensor, Tensor, Tensor]:
    """The net and its inputs, all on the meta device: shapes without values."""
    with torch.device("meta"):
        sample = torch.empty(batch, arch.latent_channels, latent_size, latent_size)
        return UNet(arch).eval(), sample, torch.empty(batch), torch.empty(batch, context_tokens, arch.context_width)


class MetaTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a pass on the meta device; a subclass says what becomes of it in `see`.

    Run under ``torch.inference_mode()``: there composite operations arrive whole, attention as one, without its matrix
    of scores.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Hashable, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], outputs: list[Tensor]) -> None:
        """An operation, its arguments and the tensors that it returned."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._result(func, args, kwargs or {})
        alone = func is aten.einsum.default and len(args[1]) == 1  # of one tensor it only turns its axes
        assert alone or func not in UNCOUNTED, f"{func} multiplies matrices and has no handle"
        self.see(func, args, tensors(result))
        return result

    def _result(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation returns, at once where one like it has returned a tensor of its own before.

        A net repeats its layers, and two thirds of a pass were spent working out the same shapes.
        """
        if func is aten.scaled_dot_product_attention.default:
            queries, _, values = args[:3]
            return queries.new_empty(*queries.shape[:-1], values.shape[-1])
        key = func, _signature(args), _signature(kwargs.items())
        if key in self._known:
            size, stride, dtype = self._known[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        result = func(*args, **kwargs)
        given = {storage_of(value) for value in [*args, *kwargs.values()] if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and storage_of(result) not in given:
            self._known[key] = result.shape, result.stride(), result.dtype
        return result


# What inference mode leaves of other products, should a net come to use them.
UNCOUNTED = {
    op.default for op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum, aten.conv1d, aten.conv_transpose1d)
}


def tensors(value: object) -> list[Tensor]:
    """Those in arguments or results, however nested."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, tuple | list) else []


def _signature(value: Any) -> Hashable:
    """What of an operation's arguments decides the form of its result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return type(value), value
    return tuple(map(_signature, value))


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """What tells tensors that share memory; it does not keep the memory."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
