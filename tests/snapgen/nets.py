"""Small architectures and nets for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snapgen.architecture import presets
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.models.unet import UNet, _seed_name
from snapgen.seeding import derive_seed

SD15: dict[str, Any] = presets.preset("sd15").model_dump(mode="json")

TINY = {
    "latent_channels": 3,
    "context_dim": 12,
    "norm_groups": 4,
    "time": {"embed_dim": 8, "hidden_dim": 16},
    "down": [
        {"channels": 8, "num_res_blocks": 1, "head_dim": 4},
        {"channels": 16, "num_res_blocks": 2, "num_transformers": 1, "head_dim": 4},
    ],
    "mid": {"num_res_blocks": 2, "num_transformers": 1, "head_dim": 4},
    "up": [
        {"channels": 8, "num_res_blocks": 2, "head_dim": 4},
        {"channels": 16, "num_res_blocks": 3, "num_transformers": 2, "head_dim": 4},
    ],
}


def tiny(changes: dict[str, Any] | None = None) -> Architecture:
    """Architecture of two levels, 8 and 16 channels wide, with overrides by path."""
    return apply_overrides(Architecture.model_validate(TINY), changes or {})


def inputs(arch: Architecture, *, batch: int = 2, size: int = 4, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A fixed sample, timestep and context that fit the architecture."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(batch, arch.latent_channels, size, size, generator=generator)
    context = torch.randn(batch, tokens, arch.context_dim, generator=generator)
    return sample, torch.linspace(0.2, 0.7, batch), context


@torch.no_grad()
def stirred(arch: Architecture) -> UNet:
    """A net whose parameters are all random, seeded by their names, so that every branch has an effect."""
    net = UNet(arch)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(derive_seed(0, _seed_name(name))))
        parameter.copy_(0.3 * noise + (1 if name.split(".")[-2].find("norm") >= 0 and name.endswith("weight") else 0))
    return net.eval()


def same_net(first: Architecture, second: Architecture) -> bool:
    """Whether two descriptions build nets of equal parameters and, from equal weights, equal outputs."""
    nets = [stirred(arch) for arch in (first, second)]
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in nets]
    if shapes[0] != shapes[1] or first.latent_channels != second.latent_channels:
        return False
    with torch.no_grad():
        outputs = [net(*inputs(net.arch)) for net in nets]
    return torch.equal(outputs[0], outputs[1])
