"""Multi-level knowledge distillation from a teacher (SnapGen, arXiv 2412.09619, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snapgen import seeding

MIN_DENOMINATOR = 1e-12
"""Smallest loss that another loss is divided by."""


def data_weight(t: Tensor) -> Tensor:
    """Weight α_t of the data against the teacher at a timestep: (B,) → (B,).

    The density of the logit-normal(0, 1), divided by its peak 4/√(2π) at t = ½: 1 at t = ½, 0 at both ends.
    """
    inner = t.float().clamp(1e-7, 1 - 1e-7)  # the density there is 0 in float32; at t = 0 and 1 it would be 0/0
    # exp(−logit(t)²/2) / (√(2π)·t·(1 − t)), over 4/√(2π)
    return torch.exp(-torch.logit(inner).square() / 2) / (4 * inner * (1 - inner))


def timestep_aware_loss(task: Tensor, kd: Tensor, t: Tensor) -> Tensor:
    """Timestep-aware scaling of two losses, S = α_t·task + (1 − α_t)·(|task| / |kd|)·kd, for each image: (B,).

    No gradient flows through the ratio, so that S has the value of ``task`` and a mixture of both gradients.
    """
    alpha = data_weight(t)
    ratio = (task.abs() / kd.abs().clamp(min=MIN_DENOMINATOR)).detach()
    return alpha * task + (1 - alpha) * ratio * kd


class FeatureProjector(nn.Sequential):
    """The projection φ from the student's features to the grid and width of the teacher's tokens: two convolutions.

    (B, in_channels, H, W) → (B, out_channels, H/stride, W/stride). The paper has two convolutions. Their kernels, the
    SiLU between them and the hidden width, which keeps as many values as the student's grid has, are our choice.

    Args:
        in_channels: channels of the student's features.
        out_channels: channels of the teacher's tokens.
        stride: positions of the student's grid along one side of a token.
        seed: seed of the weights.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, seed: int = 0) -> None:
        hidden_channels = in_channels * stride**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(seed, "projector"))
            super().__init__(
                nn.Conv2d(in_channels, hidden_channels, 3, stride=stride, padding=1),
                nn.SiLU(),
                nn.Conv2d(hidden_channels, out_channels, 1),
            )
