from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from snapgen.conditioning.captions import EmbeddingSlice, EncodedCaptions
from snapgen.conditioning.embeddings import Embeddings
from snapgen.diffusion.process import RectifiedFlow
from snapgen.io.chunked import ChunkedTensor
from snapgen.training import batches as feed
from snapgen.training.batches import Batch, BatchStream, MicroBatch, StepRandom, few_step_timesteps, training_timesteps

CPU = torch.device("cpu")
IMAGES = 40
UNSHIFTED = training_timesteps(RectifiedFlow())


def captions(*, encoders: int, seed: int) -> EncodedCaptions:
    """One a latent; each encoder has two tokens and four channels, and three of the pooled embedding."""
    generator = torch.Generator().manual_seed(seed)

    def table(*shape: int) -> ChunkedTensor:
        return ChunkedTensor([1 + torch.rand(IMAGES, *shape, generator=generator)])

    tables = [Embeddings(table(2, 4), table(3)) for _ in range(encoders)]
    places = [EmbeddingSlice(slice(2 * i, 2 * i + 2), slice(0, 4), slice(3 * i, 3 * i + 3)) for i in range(encoders)]
    return EncodedCaptions(tables, torch.arange(IMAGES), places)


def new_feed(
    *,
    batch: int = 24,
    dropout: Sequence[float] = (0.5, 0.5),
    taught: bool = True,
    times: feed.TimestepSampler = UNSHIFTED,
    seed: int = 5,
    device: torch.device = CPU,
) -> BatchStream:
    """Of latents that are their own index."""
    latents = torch.arange(IMAGES).half().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return BatchStream(
        ChunkedTensor([latents[:25].clone(), latents[25:].clone()]),
        captions(encoders=len(dropout), seed=0),
        teacher=captions(encoders=3, seed=1) if taught else None,
        dropout=dropout,
        batch_size=batch,
        timesteps=times,
        seed=seed,
        device=device,
    )


def tensors(batch: Batch) -> dict[str, Tensor]:
    assert batch.teacher is not None
    assert batch.context is not None
    assert batch.pooled is not None
    assert batch.teacher.pooled is not None
    found = {"latents": batch.latents, "noise": batch.noise, "t": batch.t}
    found |= {"context": batch.context, "pooled": batch.pooled}
    return found | {"teacher's context": batch.teacher.context, "teacher's pooled": batch.teacher.pooled}


def images(batch: Batch) -> list[int]:
    return batch.latents[:, 0, 0, 0].long().tolist()


def dropped(part: Tensor) -> Tensor:
    """(B,) whether all of an image's numbers are zero."""
    return (part == 0).flatten(1).all(1)


# --- parts and steps ---


@pytest.mark.parametrize("parts", [2, 3, 8, 24])
def test_parts_together_are_the_whole(parts: int) -> None:
    """Parts of 12, 8, 3 and 1 images: blocks of noise are cut anywhere."""
    whole = new_feed().batch(MicroBatch(3))
    pieces = [new_feed().batch(MicroBatch(3, number, parts)) for number in range(parts)]
    for name, tensor in tensors(whole).items():
        assert torch.equal(torch.cat([tensors(piece)[name] for piece in pieces]), tensor), name
    drawn = [
        torch.cat([piece.random.noise("again", piece.latents) for piece in pieces]),
        torch.cat([piece.random.quantiles("t", CPU) for piece in pieces]),
    ]
    assert torch.equal(drawn[0], whole.random.noise("again", whole.latents))
    assert torch.equal(drawn[1], whole.random.quantiles("t", CPU))


def test_a_step_is_the_same_in_any_order_of_steps() -> None:
    one, other = new_feed(), new_feed()
    ahead = {step: one.batch(MicroBatch(step)) for step in (1, 2, 3, 4)}
    back = {step: other.batch(MicroBatch(step)) for step in (4, 2, 1, 3)}
    for step, batch in ahead.items():
        assert all(torch.equal(a, b) for a, b in zip(*(tensors(x).values() for x in (batch, back[step])), strict=True))


def test_a_batch_is_float32_and_fits_together() -> None:
    batch = new_feed().batch(MicroBatch(1))
    assert {name: (tuple(x.shape), x.dtype) for name, x in tensors(batch).items()} == {
        "latents": ((24, 3, 2, 2), torch.float32),
        "noise": ((24, 3, 2, 2), torch.float32),
        "t": ((24,), torch.float32),
        "context": ((24, 4, 4), torch.float32),
        "pooled": ((24, 6), torch.float32),
        "teacher's context": ((24, 6, 4), torch.float32),
        "teacher's pooled": ((24, 9), torch.float32),
    }
    assert batch.random == StepRandom(seed=5, step=1, rows=range(24))
    assert new_feed(taught=False).batch(MicroBatch(1)).teacher is None


def test_another_seed_and_another_step_are_another_batch() -> None:
    some = [new_feed().batch(MicroBatch(1)), new_feed().batch(MicroBatch(2)), new_feed(seed=6).batch(MicroBatch(1))]
    for name in ("latents", "noise", "t", "context"):
        found = [tensors(batch)[name] for batch in some]
        assert not any(torch.equal(found[0], other) for other in found[1:]), name


def test_the_order_of_the_images_may_have_another_seed() -> None:
    plain = new_feed()
    other = BatchStream(
        plain._latents,
        plain._captions,
        teacher=None,
        dropout=[0.5, 0.5],
        batch_size=24,
        timesteps=UNSHIFTED,
        seed=5,
        order_seed=6,
        device=CPU,
    )
    first, second = (stream.batch(MicroBatch(3)) for stream in (plain, other))
    assert images(first) != images(second)
    assert torch.equal(first.t, second.t)
    assert torch.equal(first.noise, second.noise)


@pytest.mark.parametrize("batch", [8, 24, 40, 100])
def test_epochs_are_permutations(batch: int) -> None:
    """Also where a step reaches into the next epoch, or over several."""
    own = new_feed(batch=batch)
    seen = [image for step in range(1, 3 * IMAGES // batch + 4) for image in images(own.batch(MicroBatch(step)))]
    epochs = [seen[start : start + IMAGES] for start in range(0, len(seen) - IMAGES + 1, IMAGES)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_captions_belong_to_their_latents() -> None:
    batch = new_feed(dropout=(0, 0)).batch(MicroBatch(2))
    indices = torch.tensor(images(batch))
    for found, encoders, seed in [((batch.context, batch.pooled), 2, 0), (batch.teacher, 3, 1)]:
        assert found is not None
        wanted = captions(encoders=encoders, seed=seed).conditioning(indices)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- noise and timesteps ---


def test_noise_is_unit_gaussian_and_never_the_same() -> None:
    draws = [StepRandom(0, step, range(64)) for step in (1, 2)]
    like = torch.empty(64, 3, 8, 8)
    drawn = torch.cat([draw.noise(name, like) for draw in draws for name in ("a", "b")])
    assert drawn.shape == (256, 3, 8, 8)
    assert len(drawn.flatten(1)[:, 0].unique()) == 256
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)


def test_timesteps_are_one_from_each_stratum() -> None:
    t = new_feed().batch(MicroBatch(1)).t
    quantile = torch.special.ndtr(torch.logit(t.double()))
    assert (quantile.sort().values * 24).floor().tolist() == list(range(24))
    assert t.tolist() != sorted(t.tolist())


def test_quantiles_are_stratified_over_each_block() -> None:
    found = StepRandom(0, 1, range(2 * feed.NOISE_BLOCK_SIZE)).quantiles("t", CPU)
    for block in found.split(feed.NOISE_BLOCK_SIZE):
        assert (block.sort().values * feed.NOISE_BLOCK_SIZE).floor().tolist() == list(range(feed.NOISE_BLOCK_SIZE))


def test_a_shift_moves_timesteps_towards_noise() -> None:
    plain, moved = (
        new_feed(times=training_timesteps(RectifiedFlow(shift=shift))).batch(MicroBatch(1)).t for shift in (1, 3)
    )
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("shift", [1, 3, 1.7])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_a_student_is_trained_where_its_sampler_goes(steps: int, shift: float) -> None:
    visited: list[float] = []

    def net(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        visited.append(t.item())
        return x

    RectifiedFlow(shift=shift).sample(net, torch.zeros(1, 1, 1, 1), None, steps=steps)
    found = new_feed(times=few_step_timesteps(steps, shift)).batch(MicroBatch(1)).t.tolist()
    assert {t: found.count(t) for t in found} == dict.fromkeys(visited, 24 // steps)


# --- dropped captions ---


def test_each_encoder_is_dropped_on_its_own() -> None:
    own = new_feed(batch=200, dropout=(0.2, 0.6))
    batches = [own.batch(MicroBatch(step)) for step in range(1, 21)]
    contexts = torch.cat([b.context for b in batches if b.context is not None])
    pooled = torch.cat([b.pooled for b in batches if b.pooled is not None])
    first, second = dropped(contexts[:, :2]), dropped(contexts[:, 2:])
    assert torch.equal(first, dropped(pooled[:, :3]))
    assert torch.equal(second, dropped(pooled[:, 3:]))
    shares = [float(x.float().mean()) for x in (first, second, first & second)]
    assert shares == pytest.approx([0.2, 0.6, 0.12], abs=0.03)


def test_a_teacher_is_told_nothing_only_where_the_student_is_told_nothing() -> None:
    batch = new_feed(batch=200).batch(MicroBatch(1))
    assert batch.context is not None
    assert batch.teacher is not None
    assert batch.teacher.pooled is not None
    untold = dropped(batch.context)
    assert 20 < int(untold.sum()) < 80
    assert torch.equal(dropped(batch.teacher.context), untold)
    assert torch.equal(dropped(batch.teacher.pooled), untold)
    assert bool((batch.teacher.context[~untold] > 0).all())


@pytest.mark.parametrize(("dropout", "share"), [(0, 0), (1, 1)])
def test_never_and_always_are_exact(dropout: float, share: float) -> None:
    context = new_feed(batch=200, dropout=(dropout,)).batch(MicroBatch(1)).context
    assert context is not None
    assert float(dropped(context).float().mean()) == share


# --- ahead of the device ---

PARTS = [MicroBatch(step, number, 2) for step in range(1, 6) for number in range(2)]


def test_batches_come_in_order() -> None:
    own = new_feed()
    for part, batch in zip(PARTS, own.batches(iter(PARTS)), strict=True):
        assert batch.random == StepRandom(5, part.step, range(12 * part.number, 12 * part.number + 12))
        assert torch.equal(batch.noise, own.batch(part).noise)


def test_a_thread_works_ahead_in_order_but_not_far() -> None:
    """The part of reading ahead that needs no CUDA."""
    begun: list[MicroBatch] = []

    def work(part: MicroBatch) -> MicroBatch:
        begun.append(part)
        return part

    with ThreadPoolExecutor(1) as thread:
        given = feed._prefetched(thread, work, PARTS)
        found = [next(given)]
        assert len(begun) <= 1 + feed.PREFETCH
        found += given
    assert found == begun == PARTS


def test_what_goes_wrong_in_the_thread_is_told() -> None:
    with ThreadPoolExecutor(1) as thread, pytest.raises(ZeroDivisionError):
        list(feed._prefetched(thread, lambda _: 1 / 0, PARTS))


@pytest.mark.gpu
def test_batches_on_cuda_are_those_of_the_cpu() -> None:
    own, device = new_feed(), torch.device("cuda")
    for part, batch in zip(PARTS, new_feed(device=device).batches(PARTS), strict=True):
        wanted, found = tensors(own.batch(part)), tensors(batch)
        assert found["noise"].device.type == "cuda"
        del found["noise"]  # each kind of device has random numbers of its own
        assert all(torch.equal(tensor.cpu(), wanted[name]) for name, tensor in found.items())
