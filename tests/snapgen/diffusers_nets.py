"""Diffusers' U-Nets for the tests of their conversion: small ones of every shape, and full-size configurations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from snapgen.models.unet import UNet
from snapgen.seeding import derive_seed
from tests.snapgen.nets import inputs

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 3),  # diffusers means heads
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SD: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (8, 16, 24, 24),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 2,
}
THIN: dict[str, Any] = {
    **SMALL,
    "transformer_layers_per_block": (1, 2, 4),
    "use_linear_projection": True,
    "time_embedding_dim": 28,
}
ADDED: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
SDXL: dict[str, Any] = {
    **THIN,
    **ADDED,
    "sample_size": 8,
    "time_embedding_dim": None,
    "projection_class_embeddings_input_dim": 1280 + 6 * 4,
}
DREAMLITE: dict[str, Any] = {
    **SMALL,
    "use_sep_conv": False,
    "ff_mult": 3,
    "num_mid_layers": 2,
    "transformer_layers_per_block": (1, 2, 1),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "DreamLiteCrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
OWN_DREAMLITE: dict[str, Any] = {  # as the class has it by default, small
    **{key: value for key, value in SMALL.items() if not key.endswith("_types")},
    "ff_mult": 6,
}
TIMED_DREAMLITE: dict[str, Any] = {
    **DREAMLITE,
    **ADDED,
    "addition_embed_type": "time",
    "sample_size": 8,
    "projection_class_embeddings_input_dim": 6 * 4,
}
UNEVEN: dict[str, Any] = {
    **SMALL,
    "layers_per_block": (1, 3, 2),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": [[1], [2, 2, 2], [1, 1]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [3, 3, 3, 3], [1, 1]],
}
PLAIN: dict[str, Any] = {
    **SMALL,
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 3,
}


@torch.no_grad()
def reference(config: dict[str, Any], kind: type[nn.Module] = UNet2DConditionModel) -> Any:
    """Diffusers' net with every parameter random and none silent."""
    net = kind(**config)
    for name, parameter in net.named_parameters():
        parameter.copy_(drawn(name, parameter.shape))
    return net.eval()


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Weights from their name: those of norms about 1, matrices of the variance that keeps what passes through."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(0, name)))
    if len(shape) > 1:
        return noise * (shape.numel() / shape[0]) ** -0.5
    return (1 if "norm" in name and name.endswith("weight") else 0) + 0.2 * noise


@torch.no_grad()
def assert_equal_outputs(theirs: Any, ours: UNet, *, size: int = 8, **added: Any) -> None:
    sample, timestep, context = inputs(ours.arch, size=size)
    expected = theirs(sample, 1000 * timestep, context, added_cond_kwargs=added or None).sample
    check_equal(ours(sample, timestep, context), expected)


def check_equal(actual: Tensor, expected: Tensor) -> None:
    """Fp32, 1e-4 relative, and not about nothing."""
    scale = expected.std().item()
    assert scale > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


def small_kl(**changes: Any) -> AutoencoderKL:
    """A tiny AutoencoderKL, which halves the side once."""
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 1.5,
        "shift_factor": 0.06,
    }
    return AutoencoderKL(**{**shape, **changes}).eval()


SD_KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
"""Stable Diffusion's autoencoder, full size."""

FULL: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        **{key: SMALL[key] for key in ("down_block_types", "up_block_types")},
        **{"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048},
        **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "sample_size": 128},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim": 2816,
    },
    "snapgen-baseline": {
        **{key: SMALL[key] for key in ("down_block_types", "up_block_types")},
        **{"block_out_channels": (256, 512, 896), "attention_head_dim": (4, 8, 14), "cross_attention_dim": 768},
        **{"transformer_layers_per_block": (1, 2, 4), "use_linear_projection": True, "time_embedding_dim": 896},
    },
}
