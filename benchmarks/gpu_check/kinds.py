"""Time of a step by kind of operation, from torch's profiler."""

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
# The first pattern that matches the name of an operation decides its kind.
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
    """Kind of an operation, from its name and the shapes of its arguments."""
    kind = next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")
    return "depthwise convolution" if kind == "convolution" and _is_depthwise(name, shapes) else kind


def _is_depthwise(name: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the weight of a convolution has one input channel per group and several groups: (C, 1, k, k)."""
    index = 2 if name.endswith("convolution_backward") else 1
    weight = shapes[index] if len(shapes) > index else ()
    return len(weight) == 4 and weight[1] == 1 and weight[0] > 1


def shares(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Fraction of each kind in the time of one step: kernel time on CUDA, self time of the operations on the CPU."""
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
    """Self time of an operation; 0 for CUDA kernels, which the profiler lists in addition to their operations."""
    if not cuda:
        return float(event.self_cpu_time_total)
    is_operation = str(event.device_type).endswith("CPU")
    return float(event.self_device_time_total) if is_operation else 0.0
