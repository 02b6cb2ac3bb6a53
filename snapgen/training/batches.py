"""Batches of a training stage. Each is a function of the seed and its step, so that resuming needs no stored state.

A step's batch can be split over processes and over micro-batches whose gradients are accumulated. The micro-batches
together are the batch that one process would have taken in full: same order, timesteps, noise and dropped captions.
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

NOISE_BLOCK_SIZE = 16
"""Images whose noise is drawn together. A micro-batch that starts within a block draws the block and keeps its rows."""

PREFETCH = 2
"""Micro-batches that are gathered ahead of their use on CUDA."""

TimestepSampler = Callable[[int, torch.Generator], Tensor]
"""(images of a step, generator) → their timesteps (B,) in (0, 1], on the CPU."""


@dataclass(frozen=True)
class StepRandom:
    """Named random numbers for a range of a step's images, independent of how the step is split into micro-batches."""

    seed: int
    """Seed of the stage."""
    step: int
    """Step of the stage, from 1."""
    rows: range
    """Positions of these images in the step's batch."""

    def noise(self, name: str, reference: Tensor) -> Tensor:
        """Unit Gaussian noise for these images: (len(rows), *reference.shape[1:]), on the device of ``reference``."""

        def draw(seed: int) -> Tensor:
            generator = torch.Generator(reference.device).manual_seed(seed)
            return torch.randn(NOISE_BLOCK_SIZE, *reference.shape[1:], generator=generator, device=reference.device)

        return self._draw_rows(name, draw)

    def quantiles(self, name: str, device: torch.device) -> Tensor:
        """Uniform numbers in (0, 1), one per image, stratified over each block: (len(rows),)."""

        def draw(seed: int) -> Tensor:
            return rectified_flow.stratified(NOISE_BLOCK_SIZE, torch.Generator().manual_seed(seed))

        return self._draw_rows(name, draw).to(device, non_blocking=True)

    def chance(self, name: str) -> float:
        """One uniform number in [0, 1) for the whole step, the same for all its images."""
        # derive_seed gives 63 bits; a float holds 53 of them exactly.
        return (derive_seed(self.seed, name, self.step) >> 10) / (1 << 53)

    def _draw_rows(self, name: str, draw: Callable[[int], Tensor]) -> Tensor:
        """Draw every block that ``rows`` touches, each from its own seed, and cut these images' rows out of them."""
        first, last = self.rows.start // NOISE_BLOCK_SIZE, (self.rows.stop - 1) // NOISE_BLOCK_SIZE
        blocks = [draw(derive_seed(self.seed, name, self.step, block)) for block in range(first, last + 1)]
        start = self.rows.start - first * NOISE_BLOCK_SIZE
        return torch.cat(blocks)[start : start + len(self.rows)]


@dataclass(frozen=True)
class Batch:
    """Inputs of one micro-batch, on the training device."""

    latents: Tensor
    """Clean latents x₀: (B, C, H, W) float32."""
    noise: Tensor
    """Gaussian noise ε, shaped as the latents."""
    t: Tensor
    """Timesteps: (B,)."""
    context: Tensor | None
    """Caption tokens for the student, some captions dropped: (B, N, width)."""
    pooled: Tensor | None
    """Pooled caption embeddings for nets that take them, dropped with the tokens: (B, P)."""
    teacher: Conditioning | None
    """The same captions encoded for the teacher, dropped only where every encoder of the student is dropped."""
    random: StepRandom
    """Source of further random numbers that an objective draws."""
    null: Conditioning | None = None
    """The null caption as the student gets it, for guidance: one row; None: zeros."""
    teacher_null: Conditioning | None = None
    """The null caption as the teacher gets it: one row; None: zeros."""


class MicroBatch(NamedTuple):
    """One of the equal shares of a step's batch."""

    step: int
    """Step of the stage, from 1."""
    number: int = 0
    """Position among the step's micro-batches, from 0."""
    total: int = 1
    """Micro-batches of the step, over all processes."""


class _HostBatch(NamedTuple):
    """A batch before its transfer: wherever the data are stored, or in pinned memory."""

    random: StepRandom
    latents: Tensor
    t: Tensor
    student: Conditioning
    teacher: Conditioning | None


class BatchStream:
    """The batches of a stage.

    Args:
        latents: latents of all images, (N, C, H, W).
        captions: captions of all images in the same order, encoded for the net that is trained.
        teacher: the same captions encoded for its teacher; None without a teacher.
        dropout: probability of dropping each of the captions' encoders.
        batch_size: images per step, over all processes and micro-batches.
        timesteps: draws a step's timesteps.
        seed: seed of the stage.
        order_seed: seed of the images' order, if it is another one.
        device: where batches are used.
    """

    def __init__(
        self,
        latents: ChunkedTensor,
        captions: EncodedCaptions,
        *,
        teacher: EncodedCaptions | None,
        dropout: Sequence[float],
        batch_size: int,
        timesteps: TimestepSampler,
        seed: int,
        order_seed: int | None = None,
        device: torch.device,
    ) -> None:
        assert len(latents) == len(captions), "latents and captions differ in number"
        self._latents, self._captions, self._teacher = latents, captions, teacher
        self._dropout = torch.tensor(list(dropout))
        self._batch_size, self._timesteps, self._seed = batch_size, timesteps, seed
        self._order_seed = seed if order_seed is None else order_seed
        self.device = device
        self._null = captions.null().to(device)
        self._teacher_null = None if teacher is None else teacher.null().to(device)

    def batch(self, micro_batch: MicroBatch) -> Batch:
        """One micro-batch of a step."""
        return self._transfer(self._gather(micro_batch))

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Generator[Batch, None, None]:
        """Micro-batches in order, each as `batch` returns it.

        On CUDA a thread gathers the next ones in pinned memory, from where they are copied while the device computes.
        """
        if self.device.type != "cuda":
            yield from map(self.batch, micro_batches)
            return
        # The current CUDA device is per thread; without the initializer the thread would use device 0.
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(1, "feed", initializer=torch.cuda.set_device, initargs=(device,)) as thread:
            yield from map(self._transfer, _prefetched(thread, self._gather, micro_batches))

    def _gather(self, micro_batch: MicroBatch) -> _HostBatch:
        assert self._batch_size % micro_batch.total == 0, "the micro-batches do not divide the batch"
        size = self._batch_size // micro_batch.total
        rows = range(micro_batch.number * size, (micro_batch.number + 1) * size)
        own = slice(rows.start, rows.stop)
        indices = self._image_indices(micro_batch.step)[own]
        # The whole step is drawn and then cut, so that its numbers do not depend on the split.
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "draws", micro_batch.step))
        t = self._timesteps(self._batch_size, generator)[own]
        keep_mask = (torch.rand(self._batch_size, len(self._dropout), generator=generator) >= self._dropout)[own]
        teacher = None
        if self._teacher is not None:
            # (B, student's encoders) → (B, teacher's encoders)
            teacher_mask = keep_mask.any(1, keepdim=True).expand(-1, self._teacher.num_encoders)
            teacher = self._teacher.conditioning(indices, teacher_mask).map(self._pin)
        return _HostBatch(
            random=StepRandom(self._seed, micro_batch.step, rows),
            latents=self._pin(self._latents[indices]),
            t=self._pin(t),
            student=self._captions.conditioning(indices, keep_mask).map(self._pin),
            teacher=teacher,
        )

    def _transfer(self, host: _HostBatch) -> Batch:
        latents = self._to_device(host.latents).float()
        student = host.student.map(self._to_device)
        return Batch(
            latents=latents,
            noise=host.random.noise("noise", latents),
            t=self._to_device(host.t),
            context=student.context,
            pooled=student.pooled,
            teacher=None if host.teacher is None else host.teacher.map(self._to_device),
            random=host.random,
            null=self._null,
            teacher_null=self._teacher_null,
        )

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.device.type == "cpu" else tensor

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _image_indices(self, step: int) -> Tensor:
        """Images of a step: (batch_size,). Every epoch has its own order; a step may reach into the next epoch."""
        count = len(self._latents)
        start, stop = (step - 1) * self._batch_size, step * self._batch_size
        epochs = range(start // count, -(-stop // count))  # the second bound is rounded up
        orders = torch.cat([_epoch_order(count, derive_seed(self._order_seed, "order", epoch)) for epoch in epochs])
        first = epochs.start * count
        return orders[start - first : stop - first]


def _prefetched(
    thread: ThreadPoolExecutor, gather: Callable[[MicroBatch], _HostBatch], micro_batches: Iterable[MicroBatch]
) -> Iterator[_HostBatch]:
    """Results of ``gather`` in order, computed in a thread that stays up to `PREFETCH` micro-batches ahead."""
    pending: deque[Future[_HostBatch]] = deque()
    for micro_batch in micro_batches:
        pending.append(thread.submit(gather, micro_batch))
        if len(pending) > PREFETCH:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@functools.lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def training_timesteps(process: NoiseProcess) -> TimestepSampler:
    """Timesteps from a process's training distribution, stratified over the step."""
    return lambda count, generator: process.timestep_quantiles(rectified_flow.stratified(count, generator))


def few_step_timesteps(steps: int, shift: float) -> TimestepSampler:
    """The timesteps that `RectifiedFlow.sample` visits in ``steps`` steps, in equal shares: 1, …, 1/steps, shifted."""
    return equal_shares(
        rectified_flow.shift_timesteps(torch.arange(1, steps + 1, dtype=torch.float64) / steps, shift).float()
    )


def equal_shares(timesteps: Tensor) -> TimestepSampler:
    """A fixed set of timesteps (K,), each drawn for an equal share of a batch."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return timesteps[(rectified_flow.stratified(count, generator) * len(timesteps)).long()]

    return draw
