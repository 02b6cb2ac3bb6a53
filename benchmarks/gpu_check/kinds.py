"""Where a step's time goes: torch's profiler, its operations put into kinds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = (
    "convolution",
    "depthwise convolution",
    "matrix product",
    "attention",
    "normalisation",
    "elementwise",
    "copies",
    "optimizer and average",
    "compiled kernels",
    "other",
)
# The first that matches an operation's name decides; convolutions are told apart by their weight's shape.
_PATTERNS = (
    ("compiled kernels", r"^triton_|CompiledF|^## Call|inductor"),
    ("optimizer and average", r"^aten::_fused_adam|^aten::_foreach|^Optimizer\.|multi_tensor"),
    ("attention", r"scaled_dot_product|_flash_attention|_efficient_attention|fmha|cudnn_attention"),
    ("depthwise convolution", r"conv_depthwise"),
    ("convolution", r"conv"),
    ("matrix product", r"^aten::(_?addmm|mm|bmm|baddbmm|matmul|linear|mkldnn_linear\w*|_weight_int\w*)$|gemm"),
    ("normalisation", r"norm"),
    ("copies", r"^aten::(_?to_copy|copy_|cat|clone|contiguous|_to_copy|index|fill_|zero_|zeros|empty)|Memcpy|Memset"),
    (
        "elementwise",
        r"^aten::(add|sub|mul|div|silu|gelu|sum|mean|lerp|sqrt|rsqrt|pow|neg|sin|cos|exp|sigmoid|where|clamp|abs|upsample"
        r"|linalg_vector_norm|threshold|leaky_relu|softmax|_softmax|square|reciprocal|logit|eq|gt|ge|lt|le|relu)",
    ),
)


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of an operation, by its name and the shapes of its arguments."""
    kind = next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")
    return "depthwise convolution" if kind == "convolution" and _is_depthwise(name, shapes) else kind


def _is_depthwise(name: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the weight has one input channel for every output channel: (C, 1, k, k)."""
    place = 2 if name.endswith("convolution_backward") else 1
    weight = shapes[place] if len(shapes) > place else ()
    return len(weight) == 4 and weight[1] == 1 and weight[0] > 1


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each kind in the time of one step: on CUDA in the kernels', on the CPU in the operations' own."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    spent: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        spent[kind_of(event.key, event.input_shapes or ())] += _microseconds(event, cuda=cuda)
    total = sum(spent.values())
    return {kind: spent[kind] / total for kind in KINDS} if total else {}


def _microseconds(event: Any, *, cuda: bool) -> float:
    """An operation's own time. On CUDA a kernel also stands beside the operation that started it, and is left out."""
    if not cuda:
        return float(event.self_cpu_time_total)
    of_host = str(event.device_type).endswith("CPU")
    return float(event.self_device_time_total) if of_host else 0.0
