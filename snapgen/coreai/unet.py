"""The U-Net for Core AI: the net itself, with the timestep's cosines and sines as an input.

Core AI has attention and group, layer and RMS norm as operations of their own, and takes tokens with their channels
last, so that none of the forms that Core ML needs (`snapgen.coreml.layers`) is of use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snapgen.coreml.layers import time_embedding, velocity
from snapgen.models.unet import UNet


class CoreAIUNet(nn.Module):
    """A U-Net that takes ``time_features``, since half precision cannot represent 1000·t accurately enough."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net: UNet = net.to(memory_format=torch.contiguous_format)

    def forward(self, sample: Tensor, time_features: Tensor, context: Tensor | None = None) -> Tensor:
        """(1, C, H, W), (1, frequencies), (1, N, context_dim) → (1, C, H, W)."""
        return velocity(self.net, sample, time_embedding(self.net, time_features), context)
