"""Configuration of an optimizer, and the optimizers that it describes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from snapgen.config import Config
from snapgen.optim.optimizers import OptimizerGroup


class OptimizerConfig(Config):
    """How gradients become weights."""

    batch: int = Field(default=32, ge=1)
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon (arXiv 2502.16982) for the matrices inside the net, AdamW for everything else."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """The peak; Muon's steps are scaled to AdamW's root mean square and share it."""
    beta2: float = Field(default=0.99, gt=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1, gt=0)
    """Largest norm of the whole gradient."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises to its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """From the peak, held (constant), or down to zero at the last step."""
    ema: float = Field(default=0.05, ge=0, le=0.25)
    """Width of the weights' average relative to the run (EDM2's σ_rel, arXiv 2312.02696, section 3); 0: no average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights, averages and losses stay in float32."""


def build_optimizers(net: nn.Module, settings: OptimizerConfig) -> OptimizerGroup:
    """The optimizers of a net's parameters that require gradients."""
    return OptimizerGroup(
        net,
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )
