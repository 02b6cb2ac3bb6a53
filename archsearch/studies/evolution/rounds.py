"""How a study evolves a network block by block, and what it keeps of each round (arXiv 2306.00980, section 3.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from archsearch.stats.estimate import Estimate
from snapgen.architecture.schema import BlockKind
from snapgen.config import Config

Phase = Literal["robust", "evolve", "final"]
"""The robust training that comes first, a round of actions, the last training on."""


ATTRIBUTE = "evolution"
"""User attribute of a trial that is a round."""


class BlockImportance(Config):
    """What one block of a round's network is worth (arXiv 2306.00980, section 3.1: ΔCLIP / ΔLatency)."""

    block: str
    """Module path in the U-Net, as `subnets.Block.name`."""
    label: str
    site: str
    layer: int
    kind: BlockKind
    index: int
    loss: Estimate
    """Quality without the block less quality with it; above 0: it is of use (the metric is better when smaller)."""
    ms: float
    """What it costs, by the table of blocks."""

    @property
    def value(self) -> float:
        """Quality lost per millisecond saved, were it removed; infinite where removing it saves nothing."""
        return self.loss.value / self.ms if self.ms > 0 else math.inf


class EvolutionRound(Config):
    """One round: the action that led to its network, and what was measured of that after training on."""

    number: Annotated[int, Field(ge=0)]
    phase: Phase
    parent: int | None
    """Number of the round whose network was acted on; None: none."""
    removed: tuple[str, ...]
    """Blocks of the parent's network, by their names there."""
    copied: tuple[str, ...]
    metric: str
    quality: Estimate
    """Of the whole network after training on; smaller is better."""
    predicted_ms: float
    """By the table of blocks; what was measured is in the trial's score."""
    steps: Annotated[int, Field(ge=0)]
    """Trained in this round."""
    training_macs: Annotated[float, Field(ge=0)]
    """Of all training up to here: forward MACs × 3 × images."""
    worths: tuple[BlockImportance, ...]
    """Of every removable block, in the order of the forward pass; empty in the final round."""
    next: str
    """What is done next and why, in words."""
