"""Feature extractors: from images to the vectors whose distributions the distances compare."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.quality import inception
from archsearch.score import INCEPTION
from snapgen.autoencoders import perceptual
from snapgen.errors import InputError

EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen net and how images are brought to it."""

    name: str
    """`efficientnet-lite0`, or `inception` for the weights behind FID."""
    width: int
    """Features an image."""
    net: nn.Module
    """(B, 3, H, W) of [0, 255] → (B, width)."""
    own_size: bool
    """Whether the net brings images to a size of its own."""

    @torch.no_grad()
    def __call__(self, images: Tensor, *, resolution: int, batch: int = 64) -> Tensor:
        """Features of images: (B, 3, H, W) of [0, 255], uint8 or float, of any device → (B, width) float32, the net's.

        Args:
            resolution: side in pixels that the images are brought to (bilinear, antialiased when shrinking), unless
                the net has a size of its own.
        """
        found = []
        parameter = next(self.net.parameters(), images)
        for start in range(0, len(images), batch):
            some = images[start : start + batch].to(parameter.device).float()
            if not self.own_size and some.shape[-2:] != (resolution, resolution):
                some = F.interpolate(some, (resolution, resolution), mode="bilinear", antialias=True)
            found.append(self.net(some).float())
        return torch.cat(found)

    def to(self, device: torch.device) -> FeatureExtractor:
        """This extractor, its net moved to a device."""
        self.net.to(device)
        return self


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0's last feature map, pooled to 1280 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptual.efficientnet_lite0()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net.extract_features((images - 127) / 128)  # type: ignore[operator]
        return features.mean((2, 3))


def load_extractor(name: str) -> FeatureExtractor:
    """An extractor by name, or Inception by the path of its weights.

    Raises:
        InputError: if there is none of that name and no such file, or the file holds other weights.
    """
    if name == EFFICIENTNET:
        return FeatureExtractor(EFFICIENTNET, 1280, EfficientNetFeatures().eval(), own_size=False)
    return FeatureExtractor(INCEPTION, inception.WIDTH, inception.load_inception(_weights(name)), own_size=True)


def digest(name: str) -> str:
    """Digest of an extractor's weights, wherever they lie; 16 hex digits.

    Raises:
        InputError: if there is none of that name and no such file.
    """
    hashed = hashlib.sha256()
    if name == EFFICIENTNET:
        for key, tensor in perceptual.efficientnet_lite0().state_dict().items():
            hashed.update(key.encode() + tensor.numpy().tobytes())
    else:
        with _weights(name).open("rb") as file:
            hashed = hashlib.file_digest(file, "sha256")
    return hashed.hexdigest()[:16]


def _weights(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no known extractor and no file"
        raise InputError(
            name, problem, f"use {EFFICIENTNET}, or the path of the FID Inception weights", place="extractor"
        )
    return path
