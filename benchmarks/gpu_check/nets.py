"""Networks whose training step is timed: ours, ours with standard convolutions, and diffusers' of the same widths."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DreamLiteUNetModel

from benchmarks.peers import PLAIN, SHAPE
from benchmarks.train_step_nets import EMOJI, SIZES, Entry, Setting, Size, Theirs, theirs
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.presets import preset
from snapgen.architecture.schema import Architecture
from snapgen.conditioning.captions import ConditioningDims
from snapgen.models.unet import UNet
from snapgen.training.stages import FlowMatchingStage

OURS, OURS_STANDARD, UNET2D, DREAMLITE = (
    "ours",
    "ours, standard convolutions",
    "UNet2DConditionModel",
    "DreamLiteUNetModel",
)
# MQA and feed-forward ratio as in our network; DreamLite always has cross-attention and separable convolutions.
DREAMLITE_CONFIG = {"ff_mult": 3, "num_kv_heads": 1}
# Changes that make the emoji network shallow, for the small check.
SHALLOW: dict[str, Any] = {
    "mid.num_res_blocks": 1,
    "mid.num_transformers": 0,
    **{f"{way}[{level}].transformer_depth": 1 for way in ("down", "up") for level in (1, 2)},
    **{f"up[{level}].num_res_blocks": 1 for level in range(3)},
    **{f"up[{level}].num_transformers": 1 for level in (1, 2)},
}
THIN = {key: value for key, value in EMOJI.items() if key not in PLAIN} | {
    "block_out_channels": (32, 32, 48),
    "attention_head_dim": (2, 2, 3),
    "transformer_layers_per_block": (1, 1, 1),
}


def _dreamlite(**shape: Any) -> torch.nn.Module:
    return Theirs(DreamLiteUNetModel(**shape, **DREAMLITE_CONFIG))


def family(arch: Architecture, shape: dict[str, Any], size: Size) -> Size:
    """Our architecture and diffusers' networks of the same widths, with the data shapes and teacher of a size."""
    return replace(
        size,
        entries=(
            Entry(OURS, partial(UNet, arch)),
            Entry(OURS_STANDARD, partial(UNet, apply_overrides(arch, {"all.conv": "standard"}))),
            Entry(UNET2D, partial(theirs, **shape, **PLAIN)),
            Entry(DREAMLITE, partial(_dreamlite, **shape)),
        ),
    )


def families(*, small: bool) -> dict[str, Size]:
    """Networks to compare, by the name of our preset; the small check has only a shallow emoji network."""
    if small:
        return {"snapgen-emoji": family(apply_overrides(preset("snapgen-emoji"), SHALLOW), THIN, SIZES["embedded"])}
    full = SIZES["full"]
    return {
        "snapgen-imagenet": family(
            preset("snapgen-imagenet"), SHAPE, replace(full, captions=ConditioningDims(768, 77, 0))
        ),
        "snapgen-t2i": family(preset("snapgen-t2i"), {**SHAPE, "cross_attention_dim": 2304}, full),
    }


def setting_of(size: Size, device: torch.device, *, latent: int, batch: int, waits: bool = False) -> Setting:
    """Training setup shared by all networks: bfloat16, AdamW, EMA, on one batch of random images."""
    stage = FlowMatchingStage(
        name="timed", resolution=8 * latent, num_images=batch, batch_size=batch, optimizer="adamw", precision="bfloat16"
    )
    return Setting(size, device, 1, latent, stage, images=batch, waits=waits)


def halving(setting: Setting) -> Iterator[Setting]:
    """A setting, and if it is asked for another one the same with half the batch, down to a single image.

    Networks that do not fit into memory are freed before the next.
    """
    while True:
        yield setting
        gc.collect()
        torch.cuda.empty_cache()
        if setting.stage.batch_size == 1:
            return
        halved = setting.stage.model_copy(update={"batch_size": setting.stage.batch_size // 2})
        setting = replace(setting, stage=halved)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Measure peak memory: after the block, the list holds the peak of allocated bytes minus those before the block.

    On a CPU the list stays empty, because torch does not track allocations there.
    """
    peak_bytes: list[int] = []
    if device.type != "cuda":
        yield peak_bytes
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak_bytes
    peak_bytes.append(torch.cuda.max_memory_allocated(device) - before)
