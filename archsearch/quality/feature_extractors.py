"""Feature extractors, which map images to the vectors whose distributions the distances compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.quality import inception
from archsearch.score import INCEPTION
from snapgen.autoencoders import perceptual
from snapgen.errors import InputError
from snapgen.io.digests import digest_contents, digest_tensors

EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen feature network with its preprocessing."""

    name: str
    """`efficientnet-lite0`, or `inception` for the weights that FID is defined with."""
    width: int
    """Number of features per image."""
    net: nn.Module
    """The network: images (B, 3, H, W) in [0, 255] → features (B, width)."""
    own_size: bool
    """Whether the network resizes images to a fixed size itself."""

    @torch.no_grad()
    def __call__(self, images: Tensor, *, resolution: int, batch: int = 64) -> Tensor:
        """Extract features: images (B, 3, H, W) in [0, 255] → (B, width) float32 on the network's device.

        Args:
            images: uint8 or float, on any device.
            resolution: side in pixels that the images are resized to (bilinear, antialiased), unless the network
                resizes them itself.
            batch: number of images that are processed at once.
        """
        features = []
        parameter = next(self.net.parameters(), images)
        for start in range(0, len(images), batch):
            x = images[start : start + batch].to(parameter.device).float()
            if not self.own_size and x.shape[-2:] != (resolution, resolution):
                x = F.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True)
            features.append(self.net(x).float())
        return torch.cat(features)

    def to(self, device: torch.device) -> FeatureExtractor:
        """Move the network to a device and return this extractor."""
        self.net.to(device)
        return self


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0's last feature map, average-pooled to 1280 features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptual.efficientnet_lite0()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net.extract_features((images - 127) / 128)  # type: ignore[operator]
        return features.mean((2, 3))  # (B, 1280, h, w) -> (B, 1280)


def load_extractor(name: str) -> FeatureExtractor:
    """Load an extractor by name, or Inception by the path of its weights.

    Raises:
        InputError: if the name is unknown and not a file, or the file contains other weights.
    """
    if name == EFFICIENTNET:
        return FeatureExtractor(EFFICIENTNET, 1280, EfficientNetFeatures().eval(), own_size=False)
    return FeatureExtractor(INCEPTION, inception.WIDTH, inception.load_inception(_weights(name)), own_size=True)


def digest(name: str) -> str:
    """Digest of an extractor's weights (16 hex digits), independent of their path.

    Raises:
        InputError: if the name is unknown and not a file.
    """
    if name == EFFICIENTNET:
        return digest_tensors(perceptual.efficientnet_lite0().state_dict().items())
    return digest_contents([_weights(name)])


def _weights(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is neither a known extractor nor a file"
        raise InputError(
            name, problem, f"use {EFFICIENTNET}, or the path of the FID Inception weights", place="feature_extractor"
        )
    return path
