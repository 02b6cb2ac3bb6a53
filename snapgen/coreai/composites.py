"""RMSNorm as one operation of Core AI, which coreai-torch would otherwise write as a power, a mean and a product."""

from __future__ import annotations

import importlib
from typing import Any

RMS_NORM = "aten::rms_norm.default"


def lower_rms_norm(values: dict[str, Any], node: Any, location: Any) -> Any:  # noqa: ARG001 - coreai-torch's signature
    """Lower torch's RMSNorm over the last axis to Core AI's composite ``rms_norm``.

    The graph within is what runs where the runtime has no operation of its own: squares and their mean in float32, as
    in ``coreai_torch.composite_ops.RMSNorm``.
    """
    ops = importlib.import_module("coreai._compiler.dialects.coreai")
    declare = importlib.import_module("coreai_torch").generate_composite_decl
    source, _, weight, eps = (*node.args, None, None)[:4]
    x, scale = values[source.name], values[weight.name]
    attributes = {"axes": [x.type.rank - 1], "eps": eps}
    declaration = declare(x.context, "rms_norm", ["input", "scale"], ["output"], attributes)
    narrow = x.type.element_type

    @ops.graph(private=True, no_inline=True, composite_decl=declaration)  # type: ignore[untyped-decorator]
    def rms_norm(input: Any, scale: Any) -> Any:
        import numpy as np

        wide = ops.cast(input, np.float32)
        mean = ops.reduce_mean(ops.broadcasting_mul(wide, wide), [x.type.rank - 1])
        inverse = ops.rsqrt(ops.broadcasting_add(mean, ops.constant(eps, dtype=mean.type.element_type)))
        return ops.broadcasting_mul(ops.cast(ops.broadcasting_mul(wide, inverse), narrow), scale)

    return list(rms_norm(x, scale))
