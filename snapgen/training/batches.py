"""Batches of a training stage, each a function of the seed and of its step: nothing to store for a run to go on.

A step's batch may be shared out, to processes and to parts whose gradients are added up: the parts together are the
batch that one process would have taken whole, with the same order, timesteps, noise and dropped captions.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from snapgen.conditioning.captions import Conditioning, EncodedCaptions
from snapgen.diffusion import rectified_flow
from snapgen.diffusion.process import NoiseProcess
from snapgen.io.chunked import ChunkedTensor
from snapgen.seeding import derive_seed

BLOCK = 16
"""Images whose noise is drawn together; a part that begins within a block draws all of it and drops what is not its."""

AHEAD = 2
"""Parts that are gathered before they are asked for, on CUDA."""

TimestepSampler = Callable[[int, torch.Generator], Tensor]
"""(images of a step, generator) → their timesteps (B,) in (0, 1], on the CPU."""


@dataclass(frozen=True)
class StepRandom:
    """The random numbers of some images of a step: by name, the same in however many parts the step is taken."""

    seed: int
    """Of the stage."""
    step: int
    rows: range
    """Which of the step's images."""

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Unit Gaussian noise for these images: (len(rows), *like.shape[1:]), on the device of ``like``."""

        def draw(seed: int) -> Tensor:
            generator = torch.Generator(like.device).manual_seed(seed)
            return torch.randn(BLOCK, *like.shape[1:], generator=generator, device=like.device)

        return self._drawn(name, draw)

    def quantiles(self, name: str, device: torch.device) -> Tensor:
        """Uniform numbers in (0, 1), one an image, stratified over each block: (len(rows),)."""

        def draw(seed: int) -> Tensor:
            return rectified_flow.stratified(BLOCK, torch.Generator().manual_seed(seed))

        return self._drawn(name, draw).to(device, non_blocking=True)

    def chance(self, name: str) -> float:
        """A uniform number in [0, 1) of the whole step: the same for all its images."""
        return (derive_seed(self.seed, name, self.step) >> 10) / (1 << 53)

    def _drawn(self, name: str, draw: Callable[[int], Tensor]) -> Tensor:
        """Of the blocks that ``draw`` gives, each from a seed, these images' rows."""
        first, last = self.rows.start // BLOCK, (self.rows.stop - 1) // BLOCK
        blocks = [draw(derive_seed(self.seed, name, self.step, block)) for block in range(first, last + 1)]
        start = self.rows.start - first * BLOCK
        return torch.cat(blocks)[start : start + len(self.rows)]


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
    teacher: Conditioning | None
    """The teacher's, of the same captions; dropped only where every encoder of the student's is."""
    draws: StepRandom
    """For whatever else an objective draws."""


class MicroBatch(NamedTuple):
    """One of the equal parts of a step's batch."""

    step: int
    """From 1."""
    number: int = 0
    parts: int = 1


class _Gathered(NamedTuple):
    """What a batch is made of, where the data lie or in pinned memory."""

    draws: StepRandom
    latents: Tensor
    t: Tensor
    student: Conditioning
    teacher: Conditioning | None


class BatchStream:
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
        latents: ChunkedTensor,
        captions: EncodedCaptions,
        *,
        teacher: EncodedCaptions | None,
        dropout: Sequence[float],
        batch: int,
        times: TimestepSampler,
        seed: int,
        device: torch.device,
    ) -> None:
        assert len(latents) == len(captions), "one caption a latent"
        self._latents, self._captions, self._teacher = latents, captions, teacher
        self._dropout = torch.tensor(list(dropout))
        self._size, self._times, self._seed, self._device = batch, times, seed, device

    def batch(self, part: MicroBatch) -> Batch:
        """One part of a step."""
        return self._moved(self._gathered(part))

    def batches(self, parts: Iterable[MicroBatch]) -> Generator[Batch, None, None]:
        """As `batch`, one after the other.

        On CUDA a thread gathers the next ones in pinned memory, from where they are copied while the device computes.
        """
        if self._device.type != "cuda":
            yield from map(self.batch, parts)
            return
        # A thread has a current device of its own; without one it would take the first.
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(1, "feed", initializer=torch.cuda.set_device, initargs=(device,)) as thread:
            yield from map(self._moved, _ahead(thread, self._gathered, parts))

    def _gathered(self, part: MicroBatch) -> _Gathered:
        assert self._size % part.parts == 0, "parts divide the batch"
        each = self._size // part.parts
        rows = range(part.number * each, (part.number + 1) * each)
        mine = slice(rows.start, rows.stop)
        indices = self._indices(part.step)[mine]
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "draws", part.step))
        t = self._times(self._size, generator)[mine]
        kept = (torch.rand(self._size, len(self._dropout), generator=generator) >= self._dropout)[mine]
        teacher = None
        if self._teacher is not None:
            told = kept.any(1, keepdim=True).expand(-1, self._teacher.encoders)
            teacher = self._pinned(self._teacher.condition(indices, told))
        return _Gathered(
            draws=StepRandom(self._seed, part.step, rows),
            latents=self._pin(self._latents[indices]),
            t=self._pin(t),
            student=self._pinned(self._captions.condition(indices, kept)),
            teacher=teacher,
        )

    def _moved(self, given: _Gathered) -> Batch:
        latents = self._move(given.latents).float()
        student, teacher = given.student, given.teacher
        return Batch(
            latents=latents,
            noise=given.draws.noise("noise", latents),
            t=self._move(given.t),
            context=self._move(student.context),
            pooled=None if student.pooled is None else self._move(student.pooled),
            teacher=None if teacher is None else _each(teacher, self._move),
            draws=given.draws,
        )

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" and tensor.device.type == "cpu" else tensor

    def _pinned(self, condition: Conditioning) -> Conditioning:
        return _each(condition, self._pin)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _indices(self, step: int) -> Tensor:
        """Images of a step: epoch after epoch, each in an order of its own; a step may reach into the next epoch."""
        count = len(self._latents)
        start, stop = (step - 1) * self._size, step * self._size
        epochs = range(start // count, -(-stop // count))
        orders = torch.cat([_order(count, derive_seed(self._seed, "order", epoch)) for epoch in epochs])
        first = epochs.start * count
        return orders[start - first : stop - first]


def _each(condition: Conditioning, change: Callable[[Tensor], Tensor]) -> Conditioning:
    return Conditioning(change(condition.context), None if condition.pooled is None else change(condition.pooled))


def _ahead(
    thread: ThreadPoolExecutor, work: Callable[[MicroBatch], _Gathered], parts: Iterable[MicroBatch]
) -> Iterator[_Gathered]:
    """What a thread makes of the parts, in order; `AHEAD` of them are always under way."""
    pending: deque[Future[_Gathered]] = deque()
    for part in parts:
        pending.append(thread.submit(work, part))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def training_timesteps(process: NoiseProcess) -> TimestepSampler:
    """A process's timesteps of training, stratified over the step."""
    return lambda count, generator: process.times(rectified_flow.stratified(count, generator))


def few_step_timesteps(steps: int, shift: float) -> TimestepSampler:
    """The timesteps that `flow.sample` visits in so many steps, in equal shares: 1, …, 1/steps, moved by a shift."""
    return equal_shares(
        rectified_flow.shift_timesteps(torch.arange(1, steps + 1, dtype=torch.float64) / steps, shift).float()
    )


def equal_shares(visited: Tensor) -> TimestepSampler:
    """Some timesteps in equal shares."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return visited[(rectified_flow.stratified(count, generator) * len(visited)).long()]

    return draw
