"""Networks whose training step is timed: ours, ours with standard convolutions, and diffusers' of the same widths."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DreamLiteUNetModel

from benchmarks.peers import PLAIN, SHAPE
from benchmarks.train_step_nets import EMOJI, SIZES, Entry, Setting, Size, Theirs, theirs
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.presets import preset
from snapgen.architecture.schema import Architecture
from snapgen.conditioning.captions import ConditioningDims, EncodedCaptions, TextEncoderConfig, layout
from snapgen.conditioning.embeddings import Embeddings
from snapgen.diffusion.process import RectifiedFlow
from snapgen.io.chunked import ChunkedTensor
from snapgen.models.unet import UNet
from snapgen.training.batches import BatchStream, training_timesteps
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


@dataclass(frozen=True)
class BenchSetting(Setting):
    """Setting that draws its random batch once for all networks and reads the clock without a synchronization."""

    waits: bool = False
    """Whether `now` synchronizes with the device; if not, the caller does (`synchronize`)."""

    def now(self) -> float:
        """Current time in seconds."""
        return super().now() if self.waits else time.perf_counter()

    def feed(self, *, taught: bool) -> BatchStream:
        """Stream of one batch of random latents and captions."""
        return _feed(self.size.captions, self.size.teaching if taught else None, self.shape, self.device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch of latents, (B, C, H, W)."""
        return self.stage.batch_size, self.size.channels, self.latent, self.latent


@functools.lru_cache(maxsize=2)
def _feed(
    captions: ConditioningDims,
    teaching: ConditioningDims | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> BatchStream:
    noise = torch.Generator().manual_seed(0)
    return BatchStream(
        ChunkedTensor([torch.randn(shape, generator=noise).half()]),
        _captions(captions, shape[0], noise),
        teacher=_captions(teaching, shape[0], noise) if teaching else None,
        dropout=[0.1],
        batch_size=shape[0],
        timesteps=training_timesteps(RectifiedFlow()),
        seed=0,
        device=device,
    )


def _captions(shape: ConditioningDims, count: int, noise: torch.Generator) -> EncodedCaptions:
    """Random caption embeddings, one per latent: tokens (B, N, C) and pooled (B, C)."""
    tokens, pooled = (count, shape.tokens, shape.context), (count, max(1, shape.pooled))
    table = Embeddings(*(ChunkedTensor([torch.randn(size, generator=noise).half()]) for size in (tokens, pooled)))
    encoder = TextEncoderConfig(tokens=shape.tokens, pooled=shape.pooled > 0)
    return EncodedCaptions([table], torch.arange(count), layout([encoder], [(shape.context, pooled[1])]))


def setting_of(size: Size, device: torch.device, *, latent: int, batch: int, waits: bool = False) -> BenchSetting:
    """Training setup shared by all networks: bfloat16, AdamW, EMA."""
    stage = FlowMatchingStage(
        name="timed", resolution=8 * latent, num_images=batch, batch_size=batch, optimizer="adamw", precision="bfloat16"
    )
    return BenchSetting(size, device, 1, latent, stage, waits=waits)


def picked(size: Size, names: Sequence[str]) -> list[Entry]:
    """Entries with the given names."""
    return [entry for entry in size.entries if entry.name in names]


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
