"""What a student learns from its teacher beside the data: multi-level distillation (SnapGen, arXiv 2412.09619)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snapgen import seeding

SMALLEST = 1e-12
"""A teacher's loss below it counts as this where it is divided by."""


def data_weight(t: Tensor) -> Tensor:
    """α_t, how far the data leads at a timestep and not the teacher: (B,) → (B,).

    The density of the logit-normal(0, 1) over its peak, 4/√(2π) at t = ½: 1 there, 0 at both ends.
    """
    inside = t.float().clamp(1e-7, 1 - 1e-7)  # the density there is 0 in float32; at the ends themselves it is 0/0
    return torch.exp(-torch.logit(inside).square() / 2) / (4 * inside * (1 - inside))


def timestep_aware_loss(task: Tensor, kd: Tensor, t: Tensor) -> Tensor:
    """Timestep-aware scaling of two losses, S = α_t·task + (1 − α_t)·(|task| / |kd|)·kd, an image each: (B,).

    No gradient flows through the ratio, so that S has the task's value and a mixture of both gradients.
    """
    lead = data_weight(t)
    ratio = (task.abs() / kd.abs().clamp(min=SMALLEST)).detach()
    return lead * task + (1 - lead) * ratio * kd


class FeatureProjector(nn.Sequential):
    """Two convolutions from the student's features to the teacher's tokens, over grids and widths.

    (B, inside, H, W) → (B, outside, H/stride, W/stride). That there are two is the paper's; their kernels, the SiLU
    between them and the width there, which keeps as many numbers as the student's grid held, are our choice.

    Args:
        inside: channels of the student's features.
        outside: of the teacher's tokens.
        stride: positions of the student's grid along a side of one token.
        seed: of the weights.
    """

    def __init__(self, inside: int, outside: int, stride: int, *, seed: int = 0) -> None:
        between = inside * stride**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive_seed(seed, "projector"))
            super().__init__(
                nn.Conv2d(inside, between, 3, stride=stride, padding=1),
                nn.SiLU(),
                nn.Conv2d(between, outside, 1),
            )
