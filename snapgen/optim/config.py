"""Optimizer configuration, and building the optimizers that it describes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from snapgen.config import Config
from snapgen.optim.optimizers import OptimizerGroup


class OptimizerConfig(Config):
    """Configuration of the optimizer, the learning-rate schedule and the EMA."""

    batch_size: int = Field(default=32, ge=1, le=65536)
    """Images per optimizer step, over all processes."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon (arXiv 2502.16982) for the matrices inside the net and AdamW for everything else; adamw: AdamW for
    all."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate. Muon's steps are scaled to AdamW's root mean square, so that one rate serves both."""
    beta2: float = Field(default=0.99, gt=0, lt=1)
    """AdamW's β₂."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1, gt=0)
    """Largest norm of the whole gradient."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "linear"
    """Learning rate after its peak: constant, or decaying to zero at the last step (cosine, linear)."""
    ema_sigma_rel: float = Field(default=0.05, ge=0, le=0.25)
    """Width of the weights' average relative to the length of the run (σ_rel of EDM2, arXiv 2312.02696, section 3); 0:
    no average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights, averages and losses stay in float32."""


def build_optimizers(net: nn.Module, config: OptimizerConfig) -> OptimizerGroup:
    """Build the optimizers of a net's parameters that require gradients."""
    return OptimizerGroup(
        net,
        kind=config.optimizer,
        learning_rate=config.learning_rate,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        clip=config.grad_clip,
    )
