"""Display names of a table's numbers."""

from __future__ import annotations

from archsearch.score import OBJECTIVES

FULL_SIZE = "full_size_"


def label(name: str) -> str:
    """Display name of a score, of one on a range of timesteps, of a cost, or of a latency.

    >>> label("validation_loss t1"), label("full_size_macs"), label("iphone-15-pro")
    ('validation loss t1', 'full-size MACs', 'iphone-15-pro')
    """
    if name.startswith(FULL_SIZE):
        return f"full-size {label(name.removeprefix(FULL_SIZE))}"
    metric, _, part = name.partition(" ")
    known = {**{key: each.label for key, each in OBJECTIVES.items()}, "retrieval_mrr": "retrieval (MRR)"}
    return f"{known.get(metric, metric)} {part}".rstrip()
