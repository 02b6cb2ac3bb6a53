"""How a study evolves a network block by block, and what it keeps of each round (arXiv 2306.00980, section 3.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from archsearch.score import Estimate
from archsearch.table_settings import TableSettings
from snapgen.arch import Kind
from snapgen.settings import Settings

Phase = Literal["robust", "evolve", "final"]
"""The robust training that comes first, a round of actions, the last training on."""

ATTRIBUTE = "evolution"
"""User attribute of a trial that is a round."""


class EvolveSettings(Settings):
    """How a network is evolved. The paper gives no number of these: they are our choice.

    The study's protocol says how the first network is trained, and how every one is judged; where it inherits weights,
    the first network is the one that they were robustly trained in.
    """

    target_ms: float = Field(default=0, ge=0)
    """Latency to meet on the study's device; 0: by ``target_share``."""
    target_share: float | None = Field(default=None, gt=0)
    """The target over the latency of the space's base, for studies that run on any machine."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Share of the target that a network may be off and yet be at it."""
    block_dropout: float = Field(default=0.1, ge=0, lt=1)
    """How often each block is left out for a step, in all training but the last."""
    round_steps: int = Field(ge=1)
    """Trained after every action."""
    final_steps: int = Field(default=0, ge=0)
    """Trained at the end, all blocks running; 0: no such round."""
    round_rate: float = Field(default=0.3, gt=0, le=1)
    """Of the protocol's learning rate, for all training but the first."""
    group: int = Field(default=3, ge=1)
    """Blocks removed, or copied, by one action at most."""
    metric: str = "validation_loss"
    """By which blocks are valued (`studies.gauge`); clip_score:FOLDER is the paper's."""
    samples: int | None = Field(default=None, ge=8)
    """Images drawn for each value, where the metric needs them; None: the protocol's."""
    table: TableSettings = TableSettings()
    """How each block's latency is found."""
    gain: float = Field(default=0.01, ge=0, lt=1)
    """Share by which a network at the target must beat the ones before it, or the search ends."""
    rounds: int = Field(default=30, ge=1)
    """At most, the last one aside."""

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if bool(self.target_ms) == (self.target_share is not None):
            raise ValueError("give a target: either target_ms or target_share")
        return self

    def aimed(self, whole_ms: float) -> EvolveSettings:
        """With the target in milliseconds, now that the base's latency is known."""
        if self.target_share is None:
            return self
        return self.model_copy(update={"target_ms": self.target_share * whole_ms, "target_share": None})

    @property
    def most_ms(self) -> float:
        """The latency up to which a network is at the target."""
        return self.target_ms * (1 + self.tolerance)

    @property
    def least_ms(self) -> float:
        """The latency from which a network is at the target."""
        return self.target_ms * (1 - self.tolerance)


class Worth(Settings):
    """What one block of a round's network is worth (arXiv 2306.00980, section 3.1: ΔCLIP / ΔLatency)."""

    block: str
    """Module path in the U-Net, as `subnets.Block.name`."""
    label: str
    site: str
    layer: int
    kind: Kind
    index: int
    loss: Estimate
    """Quality without the block less quality with it; above 0: it is of use (the metric is better when smaller)."""
    ms: float
    """What it costs, by the table of blocks."""

    @property
    def value(self) -> float:
        """Quality lost per millisecond saved, were it removed; infinite where removing it saves nothing."""
        return self.loss.value / self.ms if self.ms > 0 else math.inf


class Round(Settings):
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
    worths: tuple[Worth, ...]
    """Of every removable block, in the order of the forward pass; empty in the final round."""
    next: str
    """What is done next and why, in words."""
