"""Short runs on latents that their captions determine: they learn, repeat, resume and notice divergence."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from archsearch.protocol import EvaluationProtocol, TeacherDistillationConfig
from archsearch.quality import short_run
from archsearch.quality.short_run import ShortRun, TrainResult
from snapgen.conditioning.captions import EmbeddingSlice, EncodedCaptions
from snapgen.conditioning.embeddings import Embeddings
from snapgen.data.dataset import ImageDataset
from snapgen.errors import InputError
from snapgen.io.chunked import ChunkedTensor
from snapgen.models.unet import UNet
from snapgen.objectives.teacher import Teacher, new_teacher
from snapgen.training.data import EncodedDataset
from snapgen.training.loop import make_accelerator
from tests.snapgen.nets import tiny

ARCH = tiny()
PROTOCOL = EvaluationProtocol(steps=40, batch_size=16, learning_rate=3e-3, prediction_type="velocity")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def dataset(device: str = "cpu") -> EncodedDataset:
    """Two captions, whose images are constant and of opposite signs."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.arange(40) % 2
    signs = torch.where(captions.view(-1, 1, 1, 1) == 0, 1.0, -1.0)
    latents = (signs * torch.ones(40, ARCH.latent_channels, 4, 4)).half()
    tokens = torch.randn(2, 3, ARCH.context_dim, generator=generator).half()
    table = Embeddings(ChunkedTensor([tokens]), ChunkedTensor([torch.zeros(2, 0)]))
    slices = [EmbeddingSlice(slice(0, 3), slice(0, ARCH.context_dim), slice(0, 0))]
    encoded = EncodedCaptions([table], captions, slices).to(torch.device(device))
    pooled = Embeddings(ChunkedTensor([tokens]), ChunkedTensor([tokens[:, 0]]))
    wide = [EmbeddingSlice(slice(0, 3), slice(0, ARCH.context_dim), slice(0, ARCH.context_dim))]
    teacher = EncodedCaptions([pooled], captions, wide).to(torch.device(device))
    return EncodedDataset(cast(ImageDataset, None), ChunkedTensor([latents.to(device)]), encoded, teacher)


def run(
    protocol: EvaluationProtocol = PROTOCOL,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    device: str = "cpu",
    block_dropout: float = 0,
    stop_at: int | None = None,
    teacher: Teacher | None = None,
) -> tuple[TrainResult, dict[str, Tensor]]:
    """Train a small net; a run with ``stop_at`` is interrupted after that many steps."""
    unet = UNet(ARCH)
    unet.init_weights(0)
    unet.to(device)
    training = ShortRun(
        unet,
        dataset(device),
        protocol,
        seed=seed,
        accelerator=make_accelerator(),
        block_dropout=block_dropout,
        teacher=teacher,
    )

    def progress(step: int) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    result = training.train(
        validate=lambda ema: [float(f(w.double().sum() for w in ema.state().values())) for f in (sum, min, max)],
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_seconds=0,
    )
    return result, training.ema.state()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prediction_type", ["velocity", "preconditioned", "v", "noise"])
def test_it_learns_with_any_prediction_type(prediction_type: str, device: str) -> None:
    result, weights = run(PROTOCOL.model_copy(update={"prediction_type": prediction_type}), device=device)
    assert not result.diverged
    losses = [loss for _, loss, _ in result.curve]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("losses", [{"features": False}, {"output": False}, {}], ids=["output", "features", "both"])
def test_it_learns_from_a_teacher(losses: dict[str, bool], tmp_path: Path) -> None:
    shape = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    teacher = new_teacher(
        shape,
        latent_channels=ARCH.latent_channels,
        context_dim=ARCH.context_dim,
        pooled_width=ARCH.context_dim,
        sample_size=4,
        seed=0,
        prediction="velocity",
    ).eval()
    protocol = PROTOCOL.model_copy(
        update={"distillation": TeacherDistillationConfig(teacher="given", scaling="fixed", **losses)}
    )
    alone, _ = run()
    result, weights = run(protocol, teacher=teacher.requires_grad_(False))
    assert not result.diverged
    assert result.curve[-1][1] != alone.curve[-1][1]  # the first step may agree: both nets begin with zero
    assert result.curve[-1][1] < result.curve[0][1]
    with pytest.raises(KeyboardInterrupt):
        run(protocol, teacher=teacher, checkpoint=tmp_path / "run", stop_at=20)
    assert same(run(protocol, teacher=teacher, checkpoint=tmp_path / "run")[1], weights)


def test_accumulated_micro_batches_are_the_batch() -> None:
    whole, _ = run()
    halves, _ = run(PROTOCOL.model_copy(update={"gradient_accumulation_steps": 2}))
    for (_, first, _), (_, second, _) in zip(whole.curve, halves.curve, strict=True):
        assert second == pytest.approx(first, rel=1e-3)


def test_recomputed_activations_give_the_same_weights() -> None:
    assert same(run()[1], run(PROTOCOL.model_copy(update={"gradient_checkpointing": True}))[1])


@pytest.mark.gpu
def test_it_learns_compiled() -> None:
    plain, _ = run(device="cuda")
    compiled, _ = run(PROTOCOL.model_copy(update={"compile": True}), device="cuda")
    assert compiled.curve[-1][1] == pytest.approx(plain.curve[-1][1], rel=0.05)


def test_robust_training_is_not_compiled() -> None:
    protocol = PROTOCOL.model_copy(update={"compile": True})
    assert short_run.training_stage(protocol).compile
    assert not short_run.training_stage(protocol, block_dropout=0.1).compile


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_in_bfloat16(device: str) -> None:
    result, _ = run(PROTOCOL.model_copy(update={"precision": "bfloat16"}), device=device)
    assert not result.diverged
    assert result.curve[-1][1] < 0.8 * result.curve[0][1]


def test_a_seed_repeats_to_the_bit_and_another_does_not() -> None:
    protocol = PROTOCOL.model_copy(update={"steps": 6})
    first, again, other = (run(protocol, seed=seed) for seed in (3, 3, 4))
    assert first[0].curve == again[0].curve
    assert same(first[1], again[1])
    assert first[0].curve != other[0].curve


def test_the_curve_has_validation_losses_in_between() -> None:
    result, _ = run()
    assert [step for step, _, _ in result.curve] == list(range(1, 41))
    assert [step for step, _, loss in result.curve if loss is not None] == [10, 20, 30]
    assert len(result.timestep_losses) == 3
    assert all(low <= high for low, high in result.timestep_losses)


def test_the_points_of_a_curve_are_about_evenly_spaced_whatever_the_number_of_steps() -> None:
    result, _ = run(PROTOCOL.model_copy(update={"curve_points": 8}))
    assert [step for step, _, loss in result.curve if loss is not None] == [5, 10, 15, 20, 25, 30, 35]
    result, _ = run(PROTOCOL.model_copy(update={"steps": 138, "curve_points": 8}))
    assert [step for step, _, loss in result.curve if loss is not None] == [20, 35, 55, 70, 90, 105, 125]


def test_validation_does_not_change_the_training() -> None:
    _, weights = run(PROTOCOL.model_copy(update={"curve_points": 8}))
    result, alone = run(PROTOCOL.model_copy(update={"curve_points": 1}))
    assert not [loss for _, _, loss in result.curve if loss is not None]
    assert same(weights, alone)


def test_the_order_of_the_images_has_a_seed_of_its_own() -> None:
    def weights(**seeds: int) -> dict[str, Tensor]:
        unet = UNet(ARCH)
        unet.init_weights(0)
        training = ShortRun(unet, dataset(), PROTOCOL, accelerator=make_accelerator(), **seeds)
        training.train()
        return training.ema.state()

    assert same(weights(seed=3), weights(seed=3, order_seed=3))
    assert not same(weights(seed=3), weights(seed=3, order_seed=4))


@pytest.mark.parametrize("block_dropout", [0, 0.3])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, block_dropout: float) -> None:
    whole = run(block_dropout=block_dropout)
    path = tmp_path / "0.safetensors"
    for stop_at in (8, 24):  # interrupted twice
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=path, stop_at=stop_at, block_dropout=block_dropout)
    steps: list[int] = []
    step = short_run.Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_run.Trainer, "_step", lambda self, n, batches: steps.append(n) or step(self, n, batches))
        resumed = run(checkpoint=path, block_dropout=block_dropout)
    assert steps == list(range(25, 41))
    assert same(whole[1], resumed[1])
    assert resumed[0].curve == whole[0].curve
    assert resumed[0].timestep_losses == whole[0].timestep_losses


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, stop_at=8)
    other = run(seed=1, checkpoint=path)
    assert same(other[1], run(seed=1)[1])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, stop_at=8)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"0\.safetensors: is damaged or not a checkpoint"):
        run(checkpoint=path)


def test_a_run_that_diverges_stops_and_says_so() -> None:
    wild = PROTOCOL.model_copy(update={"learning_rate": 1e12, "grad_clip": 1e30, "warmup_fraction": 0.0})
    result, _ = run(wild)
    assert result.diverged
    assert not result.curve or result.curve[-1][0] < 40


def test_no_average_is_the_last_weights() -> None:
    protocol = PROTOCOL.model_copy(update={"steps": 3})
    averaged, last = run(protocol), run(protocol.model_copy(update={"ema_sigma_rel": 0.0}))
    assert averaged[0].curve[0] == last[0].curve[0]
    assert not same(averaged[1], last[1])
