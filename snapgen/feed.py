"""Batches of a training stage, each a function of the seed and of its step: nothing to store for a run to go on.

A step's batch may be shared out, to processes and to parts whose gradients are added up: the parts together are the
batch that one process would have taken whole, with the same order, timesteps, noise and dropped captions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snapgen import flow
from snapgen.seeds import derive

if TYPE_CHECKING:
    from snapgen.conditioning import Captions, Condition
    from snapgen.rows import Rows

BLOCK = 16
"""Images whose noise is drawn together; a part that begins within a block draws all of it and drops what is not its."""

Times = Callable[[int, torch.Generator], Tensor]
"""(images of a step, generator) → their timesteps (B,) in (0, 1], on the CPU."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of some images of a step: by name, the same in however many parts the step is taken."""

    seed: int
    """Of the stage."""
    step: int
    rows: range
    """Which of the step's images."""

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Unit Gaussian noise for these images: (len(rows), *like.shape[1:]), on the device of ``like``."""
        first, last = self.rows.start // BLOCK, (self.rows.stop - 1) // BLOCK
        blocks = [self._block(name, block, like) for block in range(first, last + 1)]
        start = self.rows.start - first * BLOCK
        return torch.cat(blocks)[start : start + len(self.rows)]

    def _block(self, name: str, block: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(derive(self.seed, name, self.step, block))
        return torch.randn(BLOCK, *like.shape[1:], generator=generator, device=like.device)

    def quantiles(self, name: str, device: torch.device) -> Tensor:
        """Uniform numbers in (0, 1), one an image, stratified over each block: (len(rows),)."""
        first, last = self.rows.start // BLOCK, (self.rows.stop - 1) // BLOCK
        drawn = [
            flow.stratified(BLOCK, torch.Generator().manual_seed(derive(self.seed, name, self.step, block)))
            for block in range(first, last + 1)
        ]
        start = self.rows.start - first * BLOCK
        return torch.cat(drawn)[start : start + len(self.rows)].to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """What one part of a step is computed from."""

    latents: Tensor
    """(B, C, H, W) float32."""
    noise: Tensor
    """As the latents."""
    t: Tensor
    """(B,)."""
    context: Tensor | None
    """(B, N, width), the student's, some captions dropped."""
    pooled: Tensor | None
    """(B, P), likewise; for nets that take it."""
    teacher: Condition | None
    """The teacher's, of the same captions; dropped only where every encoder of the student's is."""
    draws: Draws
    """For whatever else an objective draws."""


class Feed:
    """The batches of a stage.

    Args:
        latents: of all images, (N, C, H, W).
        captions: of all images, in the same order, encoded for the net that is trained.
        teacher: likewise for its teacher; None: there is none.
        dropout: how often each of the captions' encoders is dropped.
        batch: images of a step, over all processes and parts.
        times: draws a step's timesteps.
        seed: of the stage.
    """

    def __init__(
        self,
        latents: Rows,
        captions: Captions,
        *,
        teacher: Captions | None,
        dropout: Sequence[float],
        batch: int,
        times: Times,
        seed: int,
        device: torch.device,
    ) -> None:
        assert len(latents) == len(captions), "one caption a latent"
        self._latents, self._captions, self._teacher = latents, captions, teacher
        self._dropout = torch.tensor(list(dropout))
        self._size, self._times, self._seed, self._device = batch, times, seed, device

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """One of a step's equal parts; steps count from 1."""
        assert self._size % parts == 0, "parts divide the batch"
        each = self._size // parts
        rows = range(part * each, (part + 1) * each)
        mine = slice(rows.start, rows.stop)
        indices = self._indices(step)[mine]
        generator = torch.Generator().manual_seed(derive(self._seed, "draws", step))
        t = self._times(self._size, generator)[mine]
        kept = (torch.rand(self._size, len(self._dropout), generator=generator) >= self._dropout)[mine]
        latents = self._latents[indices].to(self._device, non_blocking=True).float()
        context, pooled = (self._to(x) for x in self._captions.condition(indices, kept))
        draws = Draws(self._seed, step, rows)
        return Batch(
            latents=latents,
            noise=draws.noise("noise", latents),
            t=t.to(self._device, non_blocking=True),
            context=context,
            pooled=pooled,
            teacher=self._of_teacher(indices, kept.any(1)),
            draws=draws,
        )

    def _of_teacher(self, indices: Tensor, kept: Tensor) -> Condition | None:
        if self._teacher is None:
            return None
        condition = self._teacher.condition(indices, kept[:, None].expand(-1, self._teacher.encoders))
        context = self._to(condition.context)
        assert context is not None
        return condition._replace(context=context, pooled=self._to(condition.pooled))

    def _to(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device, non_blocking=True).float()

    def _indices(self, step: int) -> Tensor:
        """Images of a step: epoch after epoch, each in an order of its own; a step may reach into the next epoch."""
        count = len(self._latents)
        start, stop = (step - 1) * self._size, step * self._size
        epochs = range(start // count, math.ceil(stop / count))
        orders = torch.cat([_order(count, derive(self._seed, "order", epoch)) for epoch in epochs])
        first = epochs.start * count
        return orders[start - first : stop - first]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def training_times(shift: float) -> Times:
    """Logit-normal timesteps, stratified over the step, moved by a shift (SD3, section 3.1 and 5.3.2)."""
    return lambda count, generator: flow.shifted(flow.logit_normal(flow.stratified(count, generator)), shift)


def student_times(steps: int, shift: float) -> Times:
    """The timesteps that a sampler of so many even steps visits, in equal shares: 1, …, 1/steps, moved by a shift."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        quantile = flow.stratified(count, generator)
        even = (quantile * steps).floor().clamp(max=steps - 1).add(1) / steps
        return flow.shifted(even, shift)

    return draw
