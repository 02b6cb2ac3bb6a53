"""Records of measurements that nobody made."""

from __future__ import annotations

from typing import Any

from archsearch.score import LatencyRecord


def latency_record(ms: float = 2.0, **changes: Any) -> LatencyRecord:
    """A host's latency without spread, but for the changes."""
    values: dict[str, Any] = {
        "median_ms": ms,
        "lower_quartile_ms": ms,
        "upper_quartile_ms": ms,
        "runs": 100,
        "source": "measured",
        "device": "host",
        "compute_units": "CPU",
        "chip": "a chip",
        "os": "Linux",
        "threads": 1,
        "load_ms": 30.0,
        "runtime": "onnxruntime 1.0",
        "steady": True,
    }
    return LatencyRecord(**(values | changes))
