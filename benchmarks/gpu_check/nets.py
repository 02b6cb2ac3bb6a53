"""The nets whose training step is timed: ours, ours with plain convolutions, and diffusers' of the same widths."""

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

OURS, AS_PLAIN, UNET2D, DREAMLITE = "ours", "ours, plain convolutions", "UNet2DConditionModel", "DreamLiteUNetModel"
# DreamLite has cross-attention in every block and separable convolutions of its own; MQA and ratio 3 as ours.
OF_DREAMLITE = {"ff_mult": 3, "num_kv_heads": 1}
# The emoji's net for the small check, which compiles and profiles it.
SHALLOW: dict[str, Any] = {
    "mid.residual_blocks": 1,
    "mid.transformers": 0,
    **{f"{way}[{level}].transformer_depth": 1 for way in ("down", "up") for level in (1, 2)},
    **{f"up[{level}].residual_blocks": 1 for level in range(3)},
    **{f"up[{level}].transformers": 1 for level in (1, 2)},
}
THIN = {key: value for key, value in EMOJI.items() if key not in PLAIN} | {
    "block_out_channels": (32, 32, 48),
    "attention_head_dim": (2, 2, 3),
    "transformer_layers_per_block": (1, 1, 1),
}


def _dreamlite(**shape: Any) -> torch.nn.Module:
    return Theirs(DreamLiteUNetModel(**shape, **OF_DREAMLITE))


def family(arch: Architecture, shape: dict[str, Any], size: Size) -> Size:
    """A design of ours beside diffusers' nets of the same widths, on what the size says."""
    return replace(
        size,
        entries=(
            Entry(OURS, partial(UNet, arch)),
            Entry(AS_PLAIN, partial(UNet, apply_overrides(arch, {"all.conv": "plain"}))),
            Entry(UNET2D, partial(theirs, **shape, **PLAIN)),
            Entry(DREAMLITE, partial(_dreamlite, **shape)),
        ),
    )


def families(*, small: bool) -> dict[str, Size]:
    """By our preset's name; of the small check the emoji's net alone, with fewer blocks."""
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
class Fed(Setting):
    """A setting whose random batch is drawn once for all nets, and which reads the clock without waiting."""

    waits: bool = False
    """Whether the clock is read once the device has done all it was given; else the caller waits (`synchronised`)."""

    def now(self) -> float:
        """Seconds."""
        return super().now() if self.waits else time.perf_counter()

    def feed(self, *, taught: bool) -> BatchStream:
        """One batch of random latents and captions."""
        return _feed(self.size.captions, self.size.teaching if taught else None, self.shape, self.device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a batch of latents."""
        return self.stage.batch, self.size.channels, self.latent, self.latent


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
        batch=shape[0],
        times=training_timesteps(RectifiedFlow()),
        seed=0,
        device=device,
    )


def _captions(shape: ConditioningDims, count: int, noise: torch.Generator) -> EncodedCaptions:
    """Random embeddings of such a shape, one a latent."""
    tokens, pooled = (count, shape.tokens, shape.context), (count, max(1, shape.pooled))
    table = Embeddings(*(ChunkedTensor([torch.randn(size, generator=noise).half()]) for size in (tokens, pooled)))
    encoder = TextEncoderConfig(tokens=shape.tokens, pooled=shape.pooled > 0)
    return EncodedCaptions([table], torch.arange(count), layout([encoder], [(shape.context, pooled[1])]))


def setting_of(size: Size, device: torch.device, *, latent: int, batch: int, waits: bool = False) -> Fed:
    """The training that all nets share: bfloat16, AdamW, the weights' average."""
    stage = FlowMatchingStage(
        name="timed", resolution=8 * latent, images=batch, batch=batch, optimizer="adamw", precision="bfloat16"
    )
    return Fed(size, device, 1, latent, stage, waits=waits)


def picked(size: Size, names: Sequence[str]) -> list[Entry]:
    """The entries of those names."""
    return [entry for entry in size.entries if entry.name in names]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Within it memory is watched: afterwards the list holds the bytes that tensors took at most over those before it.

    On the CPU the list stays empty: torch does not count there.
    """
    found: list[int] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.append(torch.cuda.max_memory_allocated(device) - before)
