"""Settings of block latency tables, separate from the tables so that studies can be loaded without torch."""

from __future__ import annotations

from pydantic import Field

from snapgen.config import Config


class BlockTableConfig(Config):
    """Measurements that a block latency table is fitted to."""

    extra_copies: int = Field(default=3, ge=1, le=16)
    """Further copies of a block in the net from which the latency of a copy is derived."""
    validation_nets: int = Field(default=20, ge=0, le=1000)
    """Number of random sub-networks against which sums of block latencies are validated."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of those sub-networks."""
    min_repeats: int = Field(default=3, ge=1, le=100)
    """Smallest number of measurements of each net. A predicted latency is taken once."""
    max_repeats: int = Field(default=8, ge=1, le=100)
    """Largest number of measurements of each net; measuring stops earlier when the two lowest agree."""
