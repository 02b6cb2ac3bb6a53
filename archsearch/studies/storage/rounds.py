"""Rounds of the evolution of a network, block by block, as a study stores them (arXiv 2306.00980, section 3.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from archsearch.stats.estimate import Estimate
from snapgen.architecture.schema import BlockKind
from snapgen.config import Config

FINAL = "final"
"""Name of the candidate of an evolving study's final round."""

Phase = Literal["robust", "evolve", "final"]
"""Phase of a round: the robust training at the start, a round with an action, or the final training."""


class BlockImportance(Config):
    """Importance of one block of a round's network (arXiv 2306.00980, section 3.1: ΔCLIP / ΔLatency)."""

    block: str
    """Module path in the U-Net (`snapgen.architecture.block_index.BlockRef.name`)."""
    label: str
    site: str
    layer: int
    kind: BlockKind
    index: int
    loss: Estimate
    """Metric without the block minus metric with it. Lower metrics are better, so the block is useful above 0."""
    ms: float
    """Latency of the block by the block table, in milliseconds."""

    @property
    def value(self) -> float:
        """Quality lost per millisecond saved if the block is removed; infinite if removing it saves no time."""
        return self.loss.value / self.ms if self.ms > 0 else math.inf


class EvolutionRound(Config):
    """One round: the action that produced its network, and the numbers of the network after further training."""

    number: Annotated[int, Field(ge=0)]
    phase: Phase
    parent: int | None
    """Number of the round whose network was edited; None in the first round."""
    removed: tuple[str, ...]
    """Blocks removed from the parent's network, by their names there."""
    copied: tuple[str, ...]
    """Blocks copied in the parent's network, by their names there."""
    metric: str
    quality: Estimate
    """Metric of the full network after training; lower is better."""
    predicted_ms: float
    """Latency predicted by the block table; the measured latency is in the trial's score."""
    steps: Annotated[int, Field(ge=0)]
    """Training steps of this round."""
    training_macs: Annotated[float, Field(ge=0)]
    """MACs of all training up to this round: forward MACs × 3 × images."""
    worths: tuple[BlockImportance, ...]
    """Importance of every removable block, in the order of the forward pass; empty in the final round."""
    next: str
    """The next action and its reason, in words."""
