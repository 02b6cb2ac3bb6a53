"""Configuration of an evolution."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from archsearch.block_latency.config import BlockTableConfig
from snapgen.config import Config


class EvolutionConfig(Config):
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
    """By which blocks are valued (`archsearch.quality.metrics`); clip_score:FOLDER is the paper's."""
    samples: int | None = Field(default=None, ge=8)
    """Images drawn for each value, where the metric needs them; None: the protocol's."""
    table: BlockTableConfig = BlockTableConfig()
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

    def aimed(self, whole_ms: float) -> EvolutionConfig:
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
