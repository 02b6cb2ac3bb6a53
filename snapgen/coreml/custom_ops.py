"""Two normalisations as operators of our own, so that each stays one native operation of Core ML.

PyTorch's group norm converts to ten operations, one of which squares activations in half precision, where anything
beyond 255 from its mean overflows; a layer norm converts along the last axes alone. Core ML's own normalisations keep
the square inside and take any axis. Importing this module registers both with torch; `register` tells coremltools how
they convert.
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
    """As `torch.nn.functional.group_norm`, of (B, C, H, W)."""
    return F.group_norm(x, groups, weight, bias, eps).contiguous()


@torch.library.custom_op("snapgen::layer_norm", mutates_args=())
def layer_norm(x: Tensor, axis: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over one axis, with an affine along it."""
    return F.layer_norm(x.movedim(axis, -1), weight.shape, weight, bias, eps).movedim(-1, axis).contiguous()


@group_norm.register_fake
def _group_norm_shape(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@layer_norm.register_fake
def _layer_norm_shape(x: Tensor, axis: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@functools.cache
def register() -> None:
    """Registers the operators' conversions with coremltools; no other conversion is touched."""
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    def convert_group_norm(context: Any, node: Any) -> None:
        x, groups, weight, bias, eps = _get_inputs(context, node, expected=5)
        batch, channels, height, width = x.shape
        count = int(groups.val)
        # B C H W → B G (C/G · H) W: the instances are the groups.
        grouped = Builder.reshape(x=x, shape=[batch, count, channels // count * height, width])
        normal = Builder.instance_norm(x=grouped, epsilon=_like(x, eps.val))
        normal = Builder.reshape(x=normal, shape=[batch, channels, height, width])
        kind = weight.val.dtype
        result = Builder.batch_norm(
            x=normal,
            mean=np.zeros(channels, kind),
            variance=np.ones(channels, kind),
            gamma=weight.val,
            beta=bias.val,
            epsilon=_like(x, 0.0),
            name=node.name,
        )
        context.add(result)

    def convert_layer_norm(context: Any, node: Any) -> None:
        x, axis, weight, bias, eps = _get_inputs(context, node, expected=5)
        if x.dtype != weight.dtype:  # after a product with a number, which coremltools takes for float32
            x = Builder.cast(x=x, dtype="fp16")
        affine = {"gamma": weight, "beta": bias, "epsilon": _like(x, eps.val)}
        context.add(Builder.layer_norm(x=x, axes=[int(axis.val)], **affine, name=node.name))

    for name, convert in (("group_norm", convert_group_norm), ("layer_norm", convert_layer_norm)):
        convert.__name__ = f"snapgen_{name}"
        register_torch_op(convert, torch_alias=[f"snapgen::{name}", f"snapgen.{name}"])


def _like(x: Any, value: float) -> np.floating[Any]:
    """A number of the type of ``x``."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(x.dtype)(value)  # type: ignore[no-any-return]
