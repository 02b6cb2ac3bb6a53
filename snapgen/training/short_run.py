"""The training loop of a U-Net on latents: the short run of a search, and the shape that a long one takes.

Nothing in a step waits for the device: losses stay there until the next report. With one seed, one machine and one
number of threads a run repeats to the last bit on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from snapgen.diffusion import rectified_flow
from snapgen.optim.config import OptimizerConfig, build_optimizers
from snapgen.optim.ema import EMA
from snapgen.optim.schedule import lr_scale
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from snapgen.models.unet import UNet


HOPELESS = 4.0
"""A run whose recent loss is this many times its first one has diverged."""


class ShortRunConfig(OptimizerConfig):
    """How a U-Net is trained in a short run; every field changes the outcome."""

    steps: int = Field(default=240, ge=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """How often a caption is replaced by the null context, for classifier-free guidance."""
    prediction: rectified_flow.FlowPredictionType = "preconditioned"
    shift: float = Field(default=1, gt=0)
    """Resolution shift of the timesteps."""


class TrainingData(Protocol):
    """Latents with their context, by index; how many of them lie in memory is the implementation's affair."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) and contexts (B, tokens, width) of so many indices (int64, on the CPU)."""
        ...


@dataclass(frozen=True)
class LatentDataset:
    """Examples whose latents are one tensor and whose contexts are one row a distinct caption.

    The tensors may be memory-mapped and of half precision: only the batch's rows are read, and made float32.

    Args:
        latents: (N, C, H, W).
        contexts: (captions, tokens, width).
        caption: (N,) int64, the row of ``contexts`` that each latent has.
    """

    latents: Tensor
    contexts: Tensor
    caption: Tensor

    def __post_init__(self) -> None:
        assert len(self.latents) == len(self.caption), "one caption a latent"

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and contexts of so many indices, float32."""
        indices = indices.to(self.latents.device, non_blocking=True)
        return self.latents[indices].float(), self.contexts[self.caption[indices]].float()

    def to(self, device: torch.device) -> LatentDataset:
        """The same, whole, on a device; for sets that fit."""
        return LatentDataset(self.latents.to(device), self.contexts.to(device), self.caption.to(device))


@dataclass
class TrainResult:
    """What a run left behind."""

    average: dict[str, Tensor]
    """The averaged weights, in the layout of ``unet.state_dict()``."""
    losses: list[float] = field(default_factory=list)
    """The training loss of every step that was taken."""
    seconds: float = 0.0
    """Of training alone, without what ``report`` did."""
    diverged: bool = False


EvalCallback = Callable[[int, list[float], "EMA"], None]
"""(steps done, losses since the last report, averaged weights so far)."""


def train(
    unet: UNet,
    examples: TrainingData,
    settings: ShortRunConfig,
    *,
    seed: int,
    block_dropout: float = 0,
    report: EvalCallback | None = None,
    report_every: int = 50,
) -> TrainResult:
    """Train a U-Net where it lies.

    Args:
        unet: called as `flow.Net`; trained in place.
        seed: of the order of the examples, the timesteps, the noise and what is dropped. Not of the weights.
        block_dropout: how often each block is left out for a step (`snapgen.models.subnetworks`); 0: never.
        report: called every ``report_every`` steps and after the last one; the only times the device is waited for.

    Returns:
        The averaged weights and every step's loss. A run that diverges stops at the next report.
    """
    device = next(unet.parameters()).device
    unet.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(unet, settings)
    average = EMA(unet, settings.ema)
    outcome = TrainResult(average={})
    pending = torch.zeros(report_every, device=device)
    batches = _batches(examples, settings, seed=seed, device=device)
    started, reporting = time.perf_counter(), 0.0
    for step in range(1, settings.steps + 1):
        if block_dropout:
            from snapgen.models import subnetworks

            subnetworks.sample_block_dropout(unet, block_dropout, seed=seed, step=step)
        pending[(step - 1) % report_every] = _backward(unet, next(batches), settings)
        optimizers.step(lr_scale(step, settings, settings.steps))
        average.update(step)
        if step % report_every and step < settings.steps:
            continue
        recent = pending[: (step - 1) % report_every + 1].tolist()
        outcome.losses += recent
        if _hopeless(recent, outcome.losses[0]):
            outcome.diverged = True
            break
        if report is not None:
            paused = time.perf_counter()
            report(step, recent, average)
            unet.train()
            reporting += time.perf_counter() - paused
    outcome.average = average.state()
    outcome.diverged |= not all(bool(tensor.isfinite().all()) for tensor in outcome.average.values())
    outcome.seconds = time.perf_counter() - started - reporting
    return outcome


def _backward(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor], settings: ShortRunConfig) -> Tensor:
    """Adds a batch's gradients; its loss, on the device."""
    data, context, noise, t = batch
    with torch.autocast(data.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss = rectified_flow.losses(unet, data, noise, t, context, prediction=settings.prediction).mean()
    torch.autograd.backward(loss)
    return loss.detach()


def _batches(
    examples: TrainingData, settings: ShortRunConfig, *, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches without end: latents, contexts with some captions dropped, noise, timesteps."""
    indices = _shuffled(len(examples), settings.batch, seed=derive_seed(seed, "order"))
    draws = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    noises = torch.Generator(device).manual_seed(derive_seed(seed, "noise"))
    while True:
        data, context = (tensor.to(device, non_blocking=True) for tensor in examples.batch(next(indices)))
        t = rectified_flow.shift_timesteps(
            rectified_flow.logit_normal(rectified_flow.stratified(settings.batch, draws)), settings.shift
        )
        kept = torch.rand(settings.batch, generator=draws) >= settings.caption_dropout
        noise = torch.randn(data.shape, generator=noises, device=device)
        kept, t = kept.to(device, non_blocking=True), t.to(device, non_blocking=True)
        yield data, context * kept.view(-1, 1, 1), noise, t


def _shuffled(count: int, batch: int, *, seed: int) -> Iterator[Tensor]:
    """Batches of indices, epoch after epoch, each in an order of its own; a batch may reach into the next epoch."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:batch]
        left = left[batch:]


def _hopeless(losses: list[float], first: float) -> bool:
    return not sum(losses) / len(losses) < HOPELESS * first  # true of NaN, too
