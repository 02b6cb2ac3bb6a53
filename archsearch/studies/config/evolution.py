"""Configuration of the evolution of a network."""

from __future__ import annotations

from pydantic import Field

from archsearch.block_latency.config import BlockTableConfig
from snapgen.config import Config, rule


class EvolutionConfig(Config):
    """Settings of the evolution of a network. The paper publishes none of these numbers; the defaults are our choice.

    The study's protocol defines how the first network is trained and how every network is evaluated. If the protocol
    inherits weights (``init_from``), evolution starts from that robustly trained network.
    """

    target_ms: float = Field(default=0, ge=0)
    """Latency to reach on the study's device, in milliseconds; 0: use target_ratio."""
    target_ratio: float | None = Field(default=None, gt=0)
    """Target latency over the latency of the space's base, for studies that run on any machine."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """A network counts as being at the target if its latency differs from it by at most this share."""
    block_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability with which each block is left out of a training step, in all rounds but the final one."""
    round_steps: int = Field(ge=1, le=1_000_000_000)
    """Training steps after every edit."""
    final_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    """Training steps of the final round, in which all blocks run; 0: no final round."""
    round_lr_scale: float = Field(default=0.3, gt=0, le=1)
    """Learning rate of all rounds but the first, relative to the protocol's."""
    max_edits_per_round: int = Field(default=3, ge=1, le=256)
    """Largest number of blocks that one round removes or copies."""
    metric: str = "validation_loss"
    """Metric that values the blocks: validation_loss, frechet_distance, kernel_distance, retrieval or clip_score:FOLDER
    (the paper's)."""
    num_samples: int | None = Field(default=None, ge=8, le=1_000_000)
    """Images drawn for each value of the metric, where it needs images; None: the protocol's num_samples."""
    table: BlockTableConfig = BlockTableConfig()
    """Measurement of the latency of each block."""
    min_improvement: float = Field(default=0.01, ge=0, lt=1)
    """Relative improvement that a network at the target must bring over the earlier ones, or the evolution ends."""
    rounds: int = Field(default=30, ge=1, le=10_000)
    """Largest number of rounds, not counting the final one."""

    @rule
    def _has_one_target(self) -> None:
        if bool(self.target_ms) == (self.target_ratio is not None):
            raise ValueError("give a target: either target_ms or target_ratio")

    def resolve_target(self, base_ms: float) -> EvolutionConfig:
        """These settings with the target in milliseconds.

        Args:
            base_ms: latency of the space's base.
        """
        if self.target_ratio is None:
            return self
        return self.model_copy(update={"target_ms": self.target_ratio * base_ms, "target_ratio": None})

    @property
    def max_ms(self) -> float:
        """Highest latency at which a network counts as being at the target."""
        return self.target_ms * (1 + self.tolerance)

    @property
    def min_ms(self) -> float:
        """Lowest latency at which a network counts as being at the target."""
        return self.target_ms * (1 - self.tolerance)
