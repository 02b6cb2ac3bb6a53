"""Training step by step on one device, for nets that decode latents; a killed command resumes from its checkpoint."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from snapgen import seeding
from snapgen.config import Config
from snapgen.errors import InputError
from snapgen.io.cache import JSON
from snapgen.io.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from snapgen.optim.ema import EMA
from snapgen.optim.optimizers import OptimizerGroup
from snapgen.optim.schedule import cosine_with_warmup
from snapgen.progress import ProgressCallback, ignore_progress, step_message

CHECKPOINT_INTERVAL_SECONDS = 30.0
"""Minimum time between two checkpoints of a `CheckpointSession`."""


class StepwiseConfig(Config):
    """Settings that every `StepwiseTrainer` has."""

    steps: int = Field(default=2500, ge=1, le=1_000_000_000)
    """Optimizer steps."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=100, ge=0, le=1_000_000_000)
    """Steps in which the learning rate rises to its peak."""
    ema_sigma_rel: float = Field(default=0.03, gt=0, le=0.25)
    """Width of the weights' average relative to the steps since averaging began (`snapgen.optim.ema.EMA`)."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything random."""


class StepwiseTrainer(ABC):
    """Trains a net on the device where it is, and averages its weights.

    The random numbers of a step depend only on its number. The same arguments, machine and number of threads therefore
    give the same weights, however often the training is interrupted and resumed from its `state`.

    Args:
        net: trained in place.
        config: the settings.
        optimizer: see `snapgen.optim.optimizers.OptimizerGroup`.
    """

    net_key: ClassVar[str]
    """Name of the net's weights in checkpoint files."""
    seed_key: ClassVar[tuple[str, ...]]
    """Names from which the seed of a step is derived."""

    def __init__(self, net: nn.Module, config: StepwiseConfig, optimizer: Literal["adamw", "muon"]) -> None:
        self.net, self.config = net, config
        self.done = 0
        """Completed steps."""
        self.ema, self.ema_from = EMA(net, config.ema_sigma_rel), 0
        self.optimizer = OptimizerGroup(
            net,
            kind=optimizer,
            learning_rate=config.learning_rate,
            beta2=0.99,
            weight_decay=config.weight_decay,
            clip=1,
        )

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """Update the net once; returns the losses, 0-dim, on the device."""

    def generator(self) -> torch.Generator:
        """The source of the next step's random numbers."""
        return torch.Generator().manual_seed(seeding.derive_seed(self.config.seed, *self.seed_key, self.done))

    def update(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Minimize the sum of a step's losses, and count the step; returns them without their graphs."""
        torch.autograd.backward(sum(losses.values(), torch.zeros(())))
        self.optimizer.step(cosine_with_warmup(self.done, steps=self.config.steps, warmup=self.config.warmup_steps))
        self.done += 1
        self.ema.update(self.done - self.ema_from)
        return {name: loss.detach() for name, loss in losses.items()}

    def complete(self, progress: ProgressCallback = ignore_progress) -> None:
        """Run the remaining steps, calling ``progress`` after each, and `finish`."""
        while self.done < self.config.steps:
            losses = self.step()
            progress(self.done / self.config.steps, step_message(self.done, self.config.steps, losses))
        self.finish()

    def finish(self) -> None:
        """Load the averaged weights into the net."""
        self.net.load_state_dict(self.ema.state())

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
        """State on which the next steps depend in addition to the arguments, for `snapgen.io.checkpoint`.

        The tensors are not copied: save or copy them before the next step.
        """
        # The keys are those of existing checkpoint files.
        net = dict(self.net.state_dict())
        return {self.net_key: net, "average": self.ema.state(), "optimizer": self.optimizer.state()}, {
            "step": self.done
        }

    def load(self, groups: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> None:
        """Resume from the `state` of a trainer with the same arguments; call before the first step."""
        assert self.done == 0
        self.done = int(metadata["step"])
        self.net.load_state_dict(groups[self.net_key])
        self.ema.load(groups["average"])
        self.optimizer.load(groups.get("optimizer", {}))


class CheckpointSession:
    """Checkpointing of one command's training, which is resumed only under the same options.

    Args:
        path: the checkpoint file, which need not exist.
        options: everything that was requested of the training; stored with the checkpoint and compared on resuming.

    Raises:
        InputError: if the checkpoint is damaged or belongs to a training with other options.
    """

    def __init__(self, path: Path, options: Mapping[str, JSON]) -> None:
        self.path, self._options = path, options
        metadata = read_metadata(path) if path.is_file() else {}
        self.steps: int | None = metadata.get("steps")
        """Total number of training steps; None if there is no checkpoint."""
        self.seconds: float = metadata.get("seconds", 0.0)
        """Processor time of the training so far."""
        stored = metadata.get("asked", {})
        changed = next((key for key in options if metadata and stored.get(key) != options[key]), None)
        if changed:
            problem = f"belongs to a training run with a different {changed}"
            raise InputError(path, problem, "repeat that run's options, choose another --out, or delete the file")

    def restore(self, trainer: StepwiseTrainer) -> None:
        """Load the checkpoint into a trainer, if there is one."""
        if self.steps is not None:
            trainer.load(*load_checkpoint(self.path))

    def complete(self, trainer: StepwiseTrainer, progress: ProgressCallback = ignore_progress) -> None:
        """Run the remaining steps, with a checkpoint every `CHECKPOINT_INTERVAL_SECONDS`, and `finish`."""
        last_cpu_time, last_write = time.process_time(), time.monotonic()

        def on_step(fraction: float, message: str = "") -> None:
            nonlocal last_cpu_time, last_write
            self.seconds, last_cpu_time = self.seconds + time.process_time() - last_cpu_time, time.process_time()
            if time.monotonic() - last_write >= CHECKPOINT_INTERVAL_SECONDS:
                groups, metadata = trainer.state()
                metadata |= {"asked": self._options, "steps": trainer.config.steps, "seconds": self.seconds}
                save_checkpoint(self.path, groups, metadata)
                last_write = time.monotonic()
            progress(fraction, message)

        trainer.complete(on_step)
