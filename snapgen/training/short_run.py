"""Short training runs of a U-Net on latents, by which a search scores candidates.

Steps do not synchronize with the device: losses stay there until the next report. On a CPU, the same seed, machine and
number of threads give bit-identical results.
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
from snapgen.diffusion.process import PredictionType, make_process
from snapgen.optim.config import OptimizerConfig, build_optimizers
from snapgen.optim.ema import EMA
from snapgen.optim.schedule import lr_scale
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from snapgen.models.unet import UNet


DIVERGENCE_FACTOR = 4.0
"""A run has diverged when its recent mean loss is this many times its first loss."""


class ShortRunConfig(OptimizerConfig):
    """Configuration of a short run; every field changes the trained weights."""

    steps: int = Field(default=240, ge=1)
    """Optimizer steps of the short run."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability with which a caption is replaced by the empty one, for classifier-free guidance."""
    prediction_type: PredictionType = "preconditioned"
    """Meaning of the net's output. With rectified flow: velocity, data or preconditioned (scaled as in EDM). With the
    diffusion process of Stable Diffusion 1.5: v or noise."""
    timestep_shift: float = Field(default=1, gt=0)
    """Shift of the timesteps towards noise, as in SD3; 1: none."""


class TrainingData(Protocol):
    """Indexed latents with their contexts. Implementations decide how much of them is in memory."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) and contexts (B, tokens, width) at ``indices`` (B,), int64 on the CPU."""
        ...


@dataclass(frozen=True)
class LatentDataset:
    """Training data in tensors: one row of latents per example, one row of contexts per distinct caption.

    The tensors may be memory-mapped and in half precision: only a batch's rows are read and converted to float32.

    Args:
        latents: (N, C, H, W).
        contexts: (captions, tokens, width).
        caption: (N,) int64, each latent's row in ``contexts``.
    """

    latents: Tensor
    contexts: Tensor
    caption: Tensor

    def __post_init__(self) -> None:
        assert len(self.latents) == len(self.caption), "latents and captions differ in number"

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) and contexts (B, tokens, width) at ``indices``, in float32."""
        indices = indices.to(self.latents.device, non_blocking=True)
        return self.latents[indices].float(), self.contexts[self.caption[indices]].float()

    def to(self, device: torch.device) -> LatentDataset:
        """A copy that is entirely on ``device``, for data sets that fit."""
        return LatentDataset(self.latents.to(device), self.contexts.to(device), self.caption.to(device))


@dataclass
class TrainResult:
    """Weights and losses of a finished run."""

    ema_weights: dict[str, Tensor]
    """EMA of the weights, in the layout of ``unet.state_dict()``."""
    losses: list[float] = field(default_factory=list)
    """Training loss of every step."""
    seconds: float = 0.0
    """Time spent training, without the time spent in ``report``."""
    diverged: bool = False


EvalCallback = Callable[[int, list[float], "EMA"], None]
"""(steps done, losses since the last report, EMA of the weights so far)."""


def train(
    unet: UNet,
    examples: TrainingData,
    config: ShortRunConfig,
    *,
    seed: int,
    block_dropout: float = 0,
    report: EvalCallback | None = None,
    report_every: int = 50,
) -> TrainResult:
    """Train a U-Net in place, on the device where its weights are.

    Args:
        unet: a `snapgen.diffusion.rectified_flow.Denoiser`.
        examples: the training data.
        config: optimizer, steps and prediction type.
        seed: seed of the examples' order, the timesteps, the noise and the dropout; not of the weights.
        block_dropout: probability of leaving each block out of a step (`snapgen.models.subnetworks`).
        report: called every ``report_every`` steps and after the last one, the only points that wait for the device.

    Returns:
        The averaged weights and every step's loss. A run that diverges stops at the next report.
    """
    device = next(unet.parameters()).device
    unet.train().requires_grad_(True).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(unet, config)
    ema = EMA(unet, config.ema_sigma_rel)
    result = TrainResult(ema_weights={})
    pending = torch.zeros(report_every, device=device)
    batches = _batches(examples, config, seed=seed, device=device)
    started, reporting = time.perf_counter(), 0.0
    for step in range(1, config.steps + 1):
        if block_dropout:
            from snapgen.models import subnetworks

            subnetworks.sample_block_dropout(unet, block_dropout, seed=seed, step=step)
        pending[(step - 1) % report_every] = _backward(unet, next(batches), config)
        optimizers.step(lr_scale(step, config, config.steps))
        ema.update(step)
        if step % report_every and step < config.steps:
            continue
        recent = pending[: (step - 1) % report_every + 1].tolist()
        result.losses += recent
        if _has_diverged(recent, result.losses[0]):
            result.diverged = True
            break
        if report is not None:
            paused = time.perf_counter()
            report(step, recent, ema)
            unet.train()  # a report may have left it in evaluation mode
            reporting += time.perf_counter() - paused
    result.ema_weights = ema.state()
    result.diverged |= not all(bool(tensor.isfinite().all()) for tensor in result.ema_weights.values())
    result.seconds = time.perf_counter() - started - reporting
    return result


def _backward(unet: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor], config: ShortRunConfig) -> Tensor:
    """Add a batch's gradients and return its loss, which stays on the device."""
    data, context, noise, t = batch
    with torch.autocast(data.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        # E‖v_θ(x_t, t, c) − (ε − x₀)‖², SnapGen (arXiv 2412.09619), section 4
        process = make_process(config.prediction_type, shift=config.timestep_shift)
        loss = process.losses(unet, data, noise, t, context).mean()
    torch.autograd.backward(loss)
    return loss.detach()


def _batches(
    examples: TrainingData, config: ShortRunConfig, *, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless batches: latents, contexts with some captions dropped, noise, timesteps."""
    indices = _shuffled(len(examples), config.batch_size, seed=derive_seed(seed, "order"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    process = make_process(config.prediction_type, shift=config.timestep_shift)
    noise_generator = torch.Generator(device).manual_seed(derive_seed(seed, "noise"))
    while True:
        data, context = (tensor.to(device, non_blocking=True) for tensor in examples.batch(next(indices)))
        t = process.timestep_quantiles(rectified_flow.stratified(config.batch_size, generator))
        keep_mask = torch.rand(config.batch_size, generator=generator) >= config.caption_dropout
        noise = torch.randn(data.shape, generator=noise_generator, device=device)
        keep_mask, t = keep_mask.to(device, non_blocking=True), t.to(device, non_blocking=True)
        yield data, context * keep_mask.view(-1, 1, 1), noise, t  # the null context is zeros


def _shuffled(count: int, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless index batches (batch_size,). Every epoch has its own order; a batch may span two epochs."""
    generator = torch.Generator().manual_seed(seed)
    remaining = torch.empty(0, dtype=torch.int64)
    while True:
        while len(remaining) < batch_size:
            remaining = torch.cat([remaining, torch.randperm(count, generator=generator)])
        yield remaining[:batch_size]
        remaining = remaining[batch_size:]


def _has_diverged(losses: list[float], first: float) -> bool:
    return not sum(losses) / len(losses) < DIVERGENCE_FACTOR * first  # negated, so that NaN counts as diverged
