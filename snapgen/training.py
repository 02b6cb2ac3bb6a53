"""The training loop of a U-Net on latents: the short run of a search, and the shape that a long one takes.

Nothing in a step waits for the device: losses stay there until the next report. With one seed, one machine and one
number of threads a run repeats to the last bit on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from snapgen import flow
from snapgen.optimizers import Optimizers
from snapgen.seeds import derive
from snapgen.settings import Settings

if TYPE_CHECKING:
    from snapgen.unet import UNet

HOPELESS = 4.0
"""A run whose recent loss is this many times its first one has diverged."""


class Optimisation(Settings):
    """How gradients become weights."""

    batch: int = Field(default=32, ge=1)
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon (arXiv 2502.16982) for the matrices inside the net, AdamW for everything else."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """The peak; Muon's steps are scaled to AdamW's root mean square and share it."""
    beta2: float = Field(default=0.99, gt=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1, gt=0)
    """Largest norm of the whole gradient."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises to its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "linear"
    """From the peak, held (constant), or down to zero at the last step."""
    ema: float = Field(default=0.05, ge=0, le=0.25)
    """Width of the weights' average relative to the run (EDM2's σ_rel, arXiv 2312.02696, section 3); 0: no average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights, averages and losses stay in float32."""


class TrainingSettings(Optimisation):
    """How a U-Net is trained in a short run; every field changes the outcome."""

    steps: int = Field(default=240, ge=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """How often a caption is replaced by the null context, for classifier-free guidance."""
    prediction: flow.Prediction = "preconditioned"
    shift: float = Field(default=1, gt=0)
    """Resolution shift of the timesteps."""


class Examples(Protocol):
    """Latents with their context, by index; how many of them lie in memory is the implementation's affair."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) and contexts (B, tokens, width) of so many indices (int64, on the CPU)."""
        ...


@dataclass(frozen=True)
class LatentExamples:
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
        indices = indices.to(self.latents.device)
        return self.latents[indices].float(), self.contexts[self.caption[indices]].float()

    def to(self, device: torch.device) -> LatentExamples:
        """The same, whole, on a device; for sets that fit."""
        return LatentExamples(self.latents.to(device), self.contexts.to(device), self.caption.to(device))


@dataclass
class Outcome:
    """What a run left behind."""

    average: dict[str, Tensor]
    """The averaged weights, in the layout of ``unet.state_dict()``."""
    losses: list[float] = field(default_factory=list)
    """The training loss of every step that was taken."""
    seconds: float = 0.0
    """Of training alone, without what ``report`` did."""
    diverged: bool = False


Report = Callable[[int, list[float], "Average"], None]
"""(steps done, losses since the last report, averaged weights so far)."""


def train(
    unet: UNet,
    examples: Examples,
    settings: TrainingSettings,
    *,
    seed: int,
    block_dropout: float = 0,
    report: Report | None = None,
    report_every: int = 50,
) -> Outcome:
    """Train a U-Net where it lies.

    Args:
        unet: called as `flow.Net`; trained in place.
        seed: of the order of the examples, the timesteps, the noise and what is dropped. Not of the weights.
        block_dropout: how often each block is left out for a step (`snapgen.subnets`); 0: never.
        report: called every ``report_every`` steps and after the last one; the only times the device is waited for.

    Returns:
        The averaged weights and every step's loss. A run that diverges stops at the next report.
    """
    device = next(unet.parameters()).device
    unet.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizers = optimizers_of(unet, settings)
    average = Average(unet, settings.ema)
    outcome = Outcome(average={})
    pending = torch.zeros(report_every, device=device)
    batches = _batches(examples, settings, seed=seed, device=device)
    started, reporting = time.perf_counter(), 0.0
    for step in range(1, settings.steps + 1):
        if block_dropout:
            from snapgen import subnets  # which brings diffusers along, and settings are read without it

            subnets.drop(unet, block_dropout, seed=seed, step=step)
        pending[(step - 1) % report_every] = _backward(unet, next(batches), settings)
        optimizers.step(rate(step, settings, settings.steps))
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


def optimizers_of(net: nn.Module, settings: Optimisation) -> Optimizers:
    """The optimizers of a net's parameters that require gradients."""
    return Optimizers(
        net,
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )


def rate(step: int, settings: Optimisation, steps: int) -> float:
    """The learning rate of a step (1 to ``steps``) over its peak."""
    rising = round(settings.warmup * steps)
    if step <= rising:
        return step / (rising + 1)
    done = (step - 1 - rising) / max(1, steps - rising)
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0 if settings.schedule == "constant" else 1 - done


class Average:
    """The weights' exponential average, whose window grows with the run (EDM2, section 3.1).

    At step n the decay is (1 − 1/n)^(γ+1), γ such that the average's width is ``width`` times the run so far: the same
    setting suits a run of any length, and the first weights are forgotten.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        self._module = module
        self._exponent = gamma(width) if width else None
        self._live = [t for t in _state(module).values() if t.is_floating_point()]
        self._kept = [t.detach().clone() for t in self._live] if width else self._live

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (from 1)."""
        if self._exponent is not None:
            decay = (1 - 1 / step) ** (self._exponent + 1)
            torch._foreach_lerp_(self._kept, self._live, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The average, in the layout of the module's ``state_dict()``; a copy."""
        kept = iter(self._kept)
        return {
            name: (next(kept) if tensor.is_floating_point() else tensor).detach().clone()
            for name, tensor in _state(self._module).items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        names = [name for name, tensor in _state(self._module).items() if tensor.is_floating_point()]
        for kept, name in zip(self._kept, names, strict=True):
            kept.copy_(state[name])


def gamma(width: float) -> float:
    """EDM2's γ for a relative width σ_rel: the positive root of σ_rel²·(γ + 2)²·(γ + 3) = γ + 1 (its equation 125)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _backward(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor], settings: TrainingSettings) -> Tensor:
    """Adds a batch's gradients; its loss, on the device."""
    data, context, noise, t = batch
    with torch.autocast(data.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss = flow.losses(unet, data, noise, t, context, prediction=settings.prediction).mean()
    torch.autograd.backward(loss)
    return loss.detach()


def _batches(
    examples: Examples, settings: TrainingSettings, *, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches without end: latents, contexts with some captions dropped, noise, timesteps."""
    indices = _shuffled(len(examples), settings.batch, seed=derive(seed, "order"))
    draws = torch.Generator().manual_seed(derive(seed, "draws"))
    noises = torch.Generator(device).manual_seed(derive(seed, "noise"))
    while True:
        data, context = (tensor.to(device, non_blocking=True) for tensor in examples.batch(next(indices)))
        t = flow.shifted(flow.logit_normal(flow.stratified(settings.batch, draws)), settings.shift)
        kept = torch.rand(settings.batch, generator=draws) >= settings.caption_dropout
        noise = torch.randn(data.shape, generator=noises, device=device)
        yield data, context * kept.to(device).view(-1, 1, 1), noise, t.to(device)


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


def _state(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)
