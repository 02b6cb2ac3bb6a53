"""Names that modules of the U-Net had in earlier versions.

Weights that were saved under them are still loaded, and initial weights are still seeded from them. The present names
are diffusers' where the module is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from typing import TypeVar

EARLIER_NAMES = {
    "time_embedding": "time",
    "linear_1": "linear1",
    "linear_2": "linear2",
    "conv_norm_out": "norm_out",
    "time_emb_proj": "time",
    "conv_shortcut": "shortcut",
    "depthwise": "0",
    "pointwise": "1",
    "transformer_blocks": "blocks",
    "attn1": "attend_self",
    "attn2": "attend_context",
    "to_q": "queries",
    "to_kv": "keys_values",
    "norm_q": "query_norm",
    "norm_k": "key_norm",
    "to_out": "out",
    "ff.proj_in": "feed_forward.expand",
    "ff.proj_out": "feed_forward.contract",
}
"""Present parts of a module's path, and earlier ones."""

_PRESENT = re.compile(rf"\b({'|'.join(map(re.escape, EARLIER_NAMES))})\b")

T = TypeVar("T")


def earlier_name(name: str) -> str:
    """Path of a module or a weight in earlier versions."""
    return _PRESENT.sub(lambda match: EARLIER_NAMES[match[1]], name)


def rename_weights(weights: MutableMapping[str, T], names: Iterable[str]) -> None:
    """Give weights that are under earlier names the present ones, in place.

    Args:
        weights: anything by the name of a weight.
        names: the present names of all weights.
    """
    for name in names:
        if name not in weights and (earlier := earlier_name(name)) in weights:
            weights[name] = weights.pop(earlier)
