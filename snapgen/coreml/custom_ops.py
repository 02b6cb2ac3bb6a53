"""Group norm and layer norm as custom operators, each of which converts to one native Core ML normalization.

PyTorch's group norm converts to ten operations, one of which squares activations in half precision and overflows for
values more than 255 from the mean. PyTorch's layer norm converts only along the last axes. Core ML's own normalizations
have neither limit. Importing this module registers the operators with torch; `register` registers their conversions
with coremltools.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("snapgen::group_norm", mutates_args=())
def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm as in `torch.nn.functional.group_norm`: (B, C, H, W) → (B, C, H, W)."""
    return F.group_norm(x, groups, weight, bias, eps).contiguous()


@torch.library.custom_op("snapgen::layer_norm", mutates_args=())
def layer_norm(x: Tensor, axis: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over one axis, with scale and bias along it."""
    return F.layer_norm(x.movedim(axis, -1), weight.shape, weight, bias, eps).movedim(-1, axis).contiguous()


@group_norm.register_fake
def _group_norm_shape(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@layer_norm.register_fake
def _layer_norm_shape(x: Tensor, axis: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def register() -> None:
    """Register the operators' conversions with coremltools, without changing other conversions."""
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    def convert_group_norm(context: Any, node: Any) -> None:
        x, groups, weight, bias, eps = _get_inputs(context, node, expected=5)
        batch, channels, height, width = x.shape
        count = int(groups.val)
        # (B, C, H, W) -> (B, G, C/G · H, W): instance norm over the last two axes normalizes each group.
        grouped = Builder.reshape(x=x, shape=[batch, count, channels // count * height, width])
        normal = Builder.instance_norm(x=grouped, epsilon=_scalar_like(x, eps.val))
        normal = Builder.reshape(x=normal, shape=[batch, channels, height, width])
        # A batch norm with mean 0, variance 1 and epsilon 0 applies the scale and bias of each channel.
        kind = weight.val.dtype
        result = Builder.batch_norm(
            x=normal,
            mean=np.zeros(channels, kind),
            variance=np.ones(channels, kind),
            gamma=weight.val,
            beta=bias.val,
            epsilon=_scalar_like(x, 0.0),
            name=node.name,
        )
        context.add(result)

    def convert_layer_norm(context: Any, node: Any) -> None:
        x, axis, weight, bias, eps = _get_inputs(context, node, expected=5)
        if x.dtype != weight.dtype:  # coremltools takes the product with a Python number for float32
            x = Builder.cast(x=x, dtype="fp16")
        affine = {"gamma": weight, "beta": bias, "epsilon": _scalar_like(x, eps.val)}
        context.add(Builder.layer_norm(x=x, axes=[int(axis.val)], **affine, name=node.name))

    for name, convert in (("group_norm", convert_group_norm), ("layer_norm", convert_layer_norm)):
        convert.__name__ = f"snapgen_{name}"
        register_torch_op(convert, torch_alias=[f"snapgen::{name}", f"snapgen.{name}"])


def _scalar_like(x: Any, value: float) -> np.floating[Any]:
    """A NumPy scalar with the dtype of ``x``."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(x.dtype)(value)  # type: ignore[no-any-return]
