"""Runs a MIL program as coremltools holds it, in float32 by torch, so that a conversion can be proved without a Mac.

Written from the documentation of the operations (apple.github.io/coremltools), not from their conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def load(package: Path) -> Any:
    """A converted model as its files hold it."""
    from coremltools.converters.mil.frontend.milproto import load as proto
    from coremltools.models.utils import load_spec

    spec = load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    return SimpleNamespace(_mil_program=proto.load(spec, spec.specificationVersion, str(weights)))


def run(model: Any, feed: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of a converted model's main function."""
    main = model._mil_program.functions["main"]
    values: dict[Any, Any] = {main.inputs[name]: tensor for name, tensor in feed.items()}

    def value(var: Any) -> Any:
        if isinstance(var, list | tuple):
            return [value(v) for v in var]
        if var in values:
            return values[var]
        known = var.val
        assert known is not None, var
        return torch.tensor(known, dtype=torch.float32) if getattr(known, "dtype", None) == np.float16 else known

    with torch.no_grad():
        for op in main.operations:
            if op.op_type == "const":
                continue
            results = OPERATIONS[op.op_type](**{k: value(v) for k, v in op.inputs.items() if v is not None})
            values.update(zip(op.outputs, results if isinstance(results, list) else [results], strict=True))
            for var in op.outputs:
                assert tuple(values[var].shape) == tuple(var.shape), op
    return [values[var] for var in main.outputs]


def _conv(
    x: Tensor, weight: Tensor, strides: Any, pad: Any, dilations: Any, groups: Any, pad_type: str, bias: Any = None
) -> Tensor:
    assert list(dilations) == [1, 1]
    before = {"custom": list(pad), "valid": [0, 0, 0, 0]}[str(pad_type)]
    x = F.pad(x, (before[2], before[3], before[0], before[1]))
    return F.conv2d(x, weight, bias, stride=tuple(int(s) for s in strides), groups=int(groups))


def _layer_norm(x: Tensor, axes: Any, epsilon: Any, gamma: Tensor, beta: Tensor) -> Tensor:
    (axis,) = axes
    mean, variance = x.mean(axis, keepdim=True), x.var(axis, keepdim=True, unbiased=False)
    along = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    return (x - mean) / (variance + float(epsilon)).sqrt() * gamma.view(along) + beta.view(along)


def _instance_norm(x: Tensor, epsilon: Any) -> Tensor:
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (variance + float(epsilon)).sqrt()


def _batch_norm(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: Any) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _slice(x: Tensor, begin: Any, end: Any, end_mask: Any = None, begin_mask: Any = None, **others: Any) -> Tensor:
    assert not others, others
    places = []
    for i in range(x.dim()):
        first = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        last = None if end_mask is not None and end_mask[i] else int(end[i])
        places.append(slice(first, last))
    return x[tuple(places)]


def _split(x: Tensor, axis: Any, split_sizes: Any = None, num_splits: Any = None) -> list[Tensor]:
    if split_sizes is not None:
        return list(x.split([int(s) for s in split_sizes], int(axis)))
    return list(x.chunk(int(num_splits), int(axis)))


def _expand_dims(x: Tensor, axes: Any) -> Tensor:
    for axis in sorted(int(a) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _gather(x: Tensor, indices: Tensor, axis: Any, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    assert not int(batch_dims)
    assert not validate_indices
    return x.index_select(int(axis), indices.long().flatten()).view(*indices.shape, *x.shape[1:])


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "batch_norm": _batch_norm,
    "concat": lambda values, axis, **_: torch.cat(values, int(axis)),
    "conv": _conv,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": lambda x, mode: F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[str(mode)]),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "mul": lambda x, y: x * y,
    "reshape": lambda x, shape: x.reshape([int(s) for s in shape]),
    "scaled_dot_product_attention": _attention,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "split": _split,
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute([int(p) for p in perm]),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest"
    ),
}
