"""The nets of `benchmarks.train_step`, ours and diffusers', and a step of training with any of them."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.peers import PLAIN, SHAPE, Make
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.presets import preset
from snapgen.conditioning.captions import ConditioningDims, EncodedCaptions, TextEncoderConfig, layout
from snapgen.conditioning.embeddings import Embeddings
from snapgen.diffusion.process import RectifiedFlow
from snapgen.io.chunked import ChunkedTensor
from snapgen.models.unet import UNet
from snapgen.objectives import teacher
from snapgen.objectives.flow_matching import FlowMatchingObjective
from snapgen.optim.config import build_optimizers
from snapgen.optim.ema import EMA
from snapgen.training.batches import Batch, BatchStream, MicroBatch, training_timesteps
from snapgen.training.settings import DistillationConfig
from snapgen.training.stages import FlowMatchingStage

EMOJI = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (4, 6, 8),  # diffusers means heads
    "cross_attention_dim": 384,
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "time_embedding_dim": 128,
    **PLAIN,
}
# The baseline with the widths and depths above.
AS_EMOJI: dict[str, Any] = {
    "latent_channels": 4,
    "context_dim": 384,
    "norm_groups": 16,
    "time.embed_dim": 64,
    "time.hidden_dim": 128,
    "mid.head_dim": 16,
    "mid.transformer_depth": 2,
    **{f"{way}[{level}].channels": width for way in ("down", "up") for level, width in enumerate((64, 96, 128))},
    **{f"{way}[{level}].head_dim": 16 for way in ("down", "up") for level in range(3)},
    **{f"down[{level}].num_res_blocks": 1 for level in range(3)},
    **{f"up[{level}].num_res_blocks": 2 for level in range(3)},
    **{f"down[{level}].num_transformers": 1 for level in (1, 2)},
    **{f"up[{level}].num_transformers": 2 for level in (1, 2)},
    **{f"{way}[{level}].transformer_depth": level for way in ("down", "up") for level in (1, 2)},
}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "pos_embed_max_size": 192}
SMALL_TEACHER = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32, "pos_embed_max_size": 32}
"""The teacher of ``studies/training/emoji.yaml``."""


class Theirs(nn.Module):
    """Adapter that calls diffusers' net with the arguments of ours."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The output, for ``t`` in [0, 1]."""
        return self.net(sample, 1000 * t, context, return_dict=False)[0]  # type: ignore[no-any-return]

    def enable_gradient_checkpointing(self) -> None:
        """Enable diffusers' gradient checkpointing."""
        self.net.enable_gradient_checkpointing()


def theirs(**shape: Any) -> nn.Module:
    """diffusers' net of a shape."""
    return Theirs(UNet2DConditionModel(**shape))


@dataclass(frozen=True)
class Entry:
    """A net and the settings of its training."""

    name: str
    make: Make
    layout: torch.memory_format = torch.channels_last
    checkpointed: bool = False
    distilled: bool = False


@dataclass(frozen=True)
class Size:
    """Comparable nets and their training data."""

    entries: tuple[Entry, ...]
    """The nets; ours is the first."""
    channels: int
    """Number of channels of the latents."""
    captions: ConditioningDims
    teacher: dict[str, int]
    teaching: ConditioningDims
    """The teacher's captions."""


def _entries(name: str, ours: Make, twin: Make, shape: dict[str, Any]) -> tuple[Entry, ...]:
    peer = partial(theirs, **shape)
    return (
        Entry(f"ours, {name}", ours),
        Entry("ours, in UNet2D's shape", twin),
        Entry("UNet2DConditionModel", peer),
        Entry("UNet2DConditionModel, contiguous", peer, torch.contiguous_format),
        Entry(f"ours, {name}, checkpointed", ours, checkpointed=True),
        Entry("UNet2DConditionModel, checkpointed", peer, checkpointed=True),
        Entry(f"ours, {name}, distilled", ours, distilled=True),
    )


SIZES = {
    "embedded": Size(
        _entries(
            "snapgen-emoji",
            partial(UNet, preset("snapgen-emoji")),
            partial(UNet, apply_overrides(preset("snapgen-baseline"), AS_EMOJI)),
            EMOJI,
        ),
        channels=4,
        captions=ConditioningDims(384, 16, 384),
        teacher=SMALL_TEACHER,
        teaching=ConditioningDims(384, 16, 384),
    ),
    "full": Size(
        _entries(
            "snapgen-t2i",
            partial(UNet, preset("snapgen-t2i")),
            partial(UNet, apply_overrides(preset("snapgen-baseline"), {"context_dim": 2304})),
            {**SHAPE, **PLAIN, "cross_attention_dim": 2304},
        ),
        channels=16,
        captions=ConditioningDims(2304, 154, 0),
        teacher=SD35_LARGE,
        teaching=ConditioningDims(4096, 154, 2048),
    ),
}


@dataclass(frozen=True)
class Setting:
    """Device, data and settings with which all nets of a table are trained."""

    size: Size
    device: torch.device
    threads: int
    latent: int
    stage: FlowMatchingStage = field(
        default_factory=lambda: FlowMatchingStage(name="timed", resolution=32, num_images=1)
    )
    images: int = 256
    """Number of images in the data, which are random latents and captions."""
    waits: bool = True
    """Whether `now` synchronizes with CUDA; if not, the caller does."""

    def now(self) -> float:
        """Current time in seconds."""
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.device.type == "cpu" and self.threads == 1 else time.perf_counter()

    def feed(self, *, taught: bool) -> BatchStream:
        """Random latents and captions, the same for all nets."""
        shape = (self.images, self.size.channels, self.latent, self.latent)
        teaching = self.size.teaching if taught else None
        return _random_stream(self.size.captions, teaching, shape, self.stage.batch_size, self.device)


@functools.lru_cache(maxsize=2)
def _random_stream(
    captions: ConditioningDims,
    teaching: ConditioningDims | None,
    shape: tuple[int, int, int, int],
    batch_size: int,
    device: torch.device,
) -> BatchStream:
    noise = torch.Generator().manual_seed(0)
    return BatchStream(
        ChunkedTensor([torch.randn(shape, generator=noise).half()]),
        _random_captions(captions, shape[0], noise),
        teacher=_random_captions(teaching, shape[0], noise) if teaching else None,
        dropout=[0.1],
        batch_size=batch_size,
        timesteps=training_timesteps(RectifiedFlow()),
        seed=0,
        device=device,
    )


def _random_captions(shape: ConditioningDims, count: int, noise: torch.Generator) -> EncodedCaptions:
    """Random embeddings of that shape, one per latent: tokens (N, T, C) and pooled (N, P)."""
    tokens, pooled = (count, shape.tokens, shape.context), (count, max(1, shape.pooled))
    table = Embeddings(*(ChunkedTensor([torch.randn(size, generator=noise).half()]) for size in (tokens, pooled)))
    encoder = TextEncoderConfig(tokens=shape.tokens, pooled=shape.pooled > 0)
    return EncodedCaptions([table], torch.arange(count), layout([encoder], [(shape.context, pooled[1])]))


class Contestant:
    """A net with random weights and its optimizer."""

    def __init__(self, entry: Entry, setting: Setting) -> None:
        self.setting = setting
        with torch.device("meta"):
            net = entry.make()
        self.net = filled(net, setting.device).to(memory_format=entry.layout).train()  # type: ignore[call-overload]
        if entry.checkpointed:
            self.net.enable_gradient_checkpointing()
        self.teacher = self._teacher() if entry.distilled else None
        self.teacher_seconds = 0.0
        distillation = DistillationConfig() if entry.distilled else None
        self.objective = FlowMatchingObjective(
            self.net, prediction="velocity", distillation=distillation, teacher=self.teacher
        )
        self.objective.to(setting.device)
        self.feed = setting.feed(taught=entry.distilled)
        self.batch = self.feed.batch(MicroBatch(1))
        self.optimizers = build_optimizers(self.objective, setting.stage)
        self.ema = EMA(self.net, setting.stage.ema_sigma_rel)
        self.steps = 0

    def _teacher(self) -> teacher.Teacher:
        size = self.setting.size
        with torch.device("meta"):
            made = teacher.new_teacher(
                size.teacher,
                latent_channels=size.channels,
                context_dim=size.teaching.context,
                pooled_width=size.teaching.pooled,
                sample_size=self.setting.latent,
                seed=0,
            )
        made = made.bfloat16() if self.setting.device.type == "cuda" else made
        made = filled(made, self.setting.device).eval().requires_grad_(False)
        began: list[float] = []
        made.register_forward_pre_hook(lambda *_: began.append(self.setting.now()))
        made.register_forward_hook(lambda *_: self._taught(self.setting.now() - began.pop()))
        return made

    def _taught(self, seconds: float) -> None:
        self.teacher_seconds += seconds

    def step(self, batch: Batch | None = None) -> dict[str, float]:
        """Seconds of one step and of its phases."""
        stage, now = self.setting.stage, self.setting.now
        self.steps += 1
        self.teacher_seconds = 0.0
        times = [now()]
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=stage.precision == "bfloat16"):
            loss = self.objective(self.batch if batch is None else batch)["loss"]
        torch.autograd.backward(loss)
        times.append(now())
        self.optimizers.step(1.0, skip_nonfinite=True)
        times.append(now())
        self.ema.update(self.steps)
        times.append(now())
        parts = ("forward and backward", "clip and optimizer", "average")
        found = {name: after - before for name, before, after in zip(parts, times, times[1:], strict=False)}
        taught = {"teacher, of forward and backward": self.teacher_seconds} if self.teacher else {}
        return {"train step": times[-1] - times[0], **found, **taught}


@torch.no_grad()
def filled(net: nn.Module, device: torch.device) -> nn.Module:
    """Materialize a net from the meta device: small random matrices, scales of one, biases of zero."""
    net.to_empty(device=device)
    noise = torch.Generator(device).manual_seed(0)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=noise)
        else:
            tensor.fill_(float(name.endswith("weight")))
    return net
