"""Training settings that the stages of a recipe share with the short run of a search; quick to import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from snapgen.config import Config, rule
from snapgen.optim.config import OptimizerConfig


class TrainingConfig(OptimizerConfig):
    """Configuration of the optimizer, and of how a step is computed."""

    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65536)
    """Micro-batches of a process's share of the batch, whose gradients are summed."""
    compile: bool = False
    """Use torch.compile, on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""

    @rule
    def _check_accumulation(self) -> None:
        accumulated = self.gradient_accumulation_steps
        if self.batch_size % accumulated:
            raise ValueError(
                f"gradient_accumulation_steps {accumulated} does not divide batch_size {self.batch_size}; use a divisor"
            )


class DistillationConfig(Config):
    """Knowledge distillation from a teacher (SnapGen, section 3.3)."""

    output: bool = True
    """Distill the teacher's velocity."""
    features: bool = True
    """Distill the teacher's last features, through a projector."""
    scaling: Literal["timestep_aware", "fixed"] = "timestep_aware"
    """timestep_aware: SnapGen's S(task, teacher); fixed: the losses are added up with the two weights below."""
    output_weight: float = Field(default=1, ge=0)
    """Weight of the velocity's loss with fixed scaling. The default is our choice."""
    feature_weight: float = Field(default=1, ge=0)
    """Weight of the features' loss with fixed scaling. The default is our choice."""
    guidance_scale: float = Field(default=1, ge=0, le=100)
    """Guidance scale of the teacher's velocity; 1: no guidance."""

    @rule
    def _check_losses(self) -> None:
        if not (self.output or self.features):
            raise ValueError("output and features are both off; enable one, or remove distillation")
