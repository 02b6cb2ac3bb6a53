"""Small architectures and nets for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet
from snapgen.seeding import derive_seed

SD15: dict[str, Any] = presets.preset("sd15").model_dump(mode="json")

TINY = {
    "latent_channels": 3,
    "context_width": 12,
    "norm_groups": 4,
    "time": {"frequencies": 8, "width": 16},
    "down": [
        {"channels": 8, "residual_blocks": 1, "head_width": 4},
        {"channels": 16, "residual_blocks": 2, "transformers": 1, "head_width": 4},
    ],
    "mid": {"residual_blocks": 2, "transformers": 1, "head_width": 4},
    "up": [
        {"channels": 8, "residual_blocks": 2, "head_width": 4},
        {"channels": 16, "residual_blocks": 3, "transformers": 2, "head_width": 4},
    ],
}


def tiny(changes: dict[str, Any] | None = None) -> Architecture:
    """Two levels, 8 and 16 channels, with changes along paths."""
    return apply_overrides(Architecture.model_validate(TINY), changes or {})


def inputs(arch: Architecture, *, batch: int = 2, size: int = 4, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A fixed sample, timestep and context that fit the architecture."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(batch, arch.latent_channels, size, size, generator=generator)
    context = torch.randn(batch, tokens, arch.context_width, generator=generator)
    return sample, torch.linspace(0.2, 0.7, batch), context


@torch.no_grad()
def stirred(arch: Architecture) -> UNet:
    """The net with every parameter random, from its name, so that no branch is silent."""
    net = UNet(arch)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(derive_seed(0, name)))
        parameter.copy_(0.3 * noise + (1 if name.split(".")[-2].find("norm") >= 0 and name.endswith("weight") else 0))
    return net.eval()


def same_net(one: Architecture, other: Architecture) -> bool:
    """Whether two descriptions build nets of equal parameters and, from equal weights, equal outputs."""
    nets = [stirred(arch) for arch in (one, other)]
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in nets]
    if shapes[0] != shapes[1] or one.latent_channels != other.latent_channels:
        return False
    with torch.no_grad():
        outputs = [net(*inputs(net.arch)) for net in nets]
    return torch.equal(outputs[0], outputs[1])
