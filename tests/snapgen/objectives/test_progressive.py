from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapgen.diffusion import variance_preserving
from snapgen.models.unet import UNet
from snapgen.objectives.progressive import ProgressiveDistillationObjective, truncated_snr, x0_for_one_step
from snapgen.training.batches import Batch, StepRandom
from snapgen.training.stages import ProgressiveDistillationStage
from tests.snapgen.diffusion.test_variance_preserving import END, NEXT, NOW, at, one
from tests.snapgen.lessons import NoReading, batch, student
from tests.snapgen.nets import stirred, tiny


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the tests of the process."""
    monkeypatch.setattr(variance_preserving, "_schedule", lambda _: torch.tensor([[1, 0.8, 0.6], [0, 0.6, 0.8]]))


def stage(**changes: Any) -> ProgressiveDistillationStage:
    return ProgressiveDistillationStage(
        name="x", resolution=32, num_images=16, batch_size=2, **{"teacher_steps": 16, **changes}
    )


def own_teacher() -> UNet:
    with torch.no_grad():
        found = stirred(tiny())
        for number, weight in enumerate(found.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    found.requires_grad_(False)
    return found


def objective(
    prediction: variance_preserving.DiffusionPredictionType = "v", **changes: Any
) -> tuple[ProgressiveDistillationObjective, UNet]:
    teaches = own_teacher()
    return ProgressiveDistillationObjective(
        student(), teacher=teaches, stage=stage(**changes), prediction=prediction
    ), teaches


def some_batch() -> Batch:
    return batch(t=[0.999, 0.249])


def coefficients(t: list[float]) -> tuple[Tensor, Tensor]:
    return variance_preserving.alpha_sigma(torch.tensor(t), torch.zeros(len(t), 1, 1, 1))


def two_steps(teaches: UNet, z: Tensor, context: Tensor, w: float | None) -> Tensor:
    """z'' of a batch at t = (0.999, 0.249) by two of sixteen steps, in the formulas' own letters."""
    times = [[0.999, 0.249], [0.937, 0.187], [0.874, 0.124]]  # 1000 − 62.5·k, halves rounded to even, − 1
    for now, then in pairwise(times):
        t = torch.tensor(now)
        v = teaches(z, t, context)
        if w is not None:
            v = w * v - (w - 1) * teaches(z, t, torch.zeros_like(context))
        (alpha, sigma), (next_alpha, next_sigma) = coefficients(now), coefficients(then)
        x, noise = alpha * z - sigma * v, sigma * z + alpha * v
        z = next_alpha * x + next_sigma * noise
    return z


# --- the closed form ---


@pytest.mark.usefixtures("simple")
def test_the_closed_form_by_hand() -> None:
    """z = 2 at (0.6, 0.8), z'' = 1.85 at (0.8, 0.6): (1.85 − 0.75·2) / (0.8 − 0.75·0.6) = 1; the data as is."""
    torch.testing.assert_close(x0_for_one_step(one(2), one(1.85), at(NOW), at(NEXT)), one(1))
    torch.testing.assert_close(x0_for_one_step(one(2), one(0.7), at(NOW), at(END)), one(0.7))


@pytest.mark.usefixtures("simple")
def test_the_weight_by_hand() -> None:
    """(0.8 / 0.6)² = 16/9; (0.6 / 0.8)² is below 1 and counts as 1."""
    found = truncated_snr(torch.tensor([NEXT, NOW]), torch.zeros(2, 1, 1, 1))
    torch.testing.assert_close(found, torch.tensor([16 / 9, 1]))


@pytest.mark.parametrize("w", [None, 5.0])
def test_one_step_to_the_target_lands_where_two_of_the_teachers_do(w: float | None) -> None:
    learner, teaches = objective()
    some = some_batch()
    assert some.context is not None
    z = variance_preserving.add_noise(some.latents, some.noise, some.t)
    scale = None if w is None else torch.full((2, 1, 1, 1), w)
    wanted = learner.target_x0(z, some.t, some.context, scale)
    landed = variance_preserving.ddim_step(z, wanted, some.t, torch.tensor([0.874, 0.124]))
    torch.testing.assert_close(landed, two_steps(teaches, z, some.context, w), rtol=1e-4, atol=1e-4)
    assert not wanted.requires_grad


def test_the_last_two_steps_end_in_the_data() -> None:
    learner, teaches = objective()
    some = batch(t=[0.124, 0.124])
    z = variance_preserving.add_noise(some.latents, some.noise, some.t)
    between = torch.tensor([0.061, 0.061])  # 62.5 is rounded to even
    first = variance_preserving.predict_x0(teaches(z, some.t, some.context), z, some.t, "v")
    z_between = variance_preserving.ddim_step(z, first, some.t, between)
    reached = variance_preserving.predict_x0(teaches(z_between, between, some.context), z_between, between, "v")
    torch.testing.assert_close(learner.target_x0(z, some.t, some.context, None), reached, rtol=1e-4, atol=1e-4)


def test_every_timestep_of_the_student_has_its_two_steps() -> None:
    for steps in (2, 16, 32, 62, 1000):
        learner = ProgressiveDistillationObjective(student(), teacher=own_teacher(), stage=stage(teacher_steps=steps))
        visited = variance_preserving.ddim_timesteps(steps)
        between, end = learner._next_timesteps(visited[:-1:2])
        assert torch.equal(between, visited[1::2])
        assert torch.equal(end, visited[2::2])


# --- the losses ---


def losses_by_hand(
    learner: ProgressiveDistillationObjective, teaches: UNet, some: Batch, w: float | None
) -> tuple[Tensor, Tensor]:
    """L_dstl and L_ori, (B,) each."""
    assert some.context is not None
    alpha, sigma = coefficients(some.t.tolist())
    end_alpha, end_sigma = coefficients([0.874, 0.124])
    z = alpha * some.latents + sigma * some.noise
    v = told = learner.student(z, some.t, some.context)
    if w is not None:
        v = w * told - (w - 1) * learner.student(z, some.t, torch.zeros_like(some.context))
    ratio = end_sigma / sigma
    wanted = (two_steps(teaches, z, some.context, w) - ratio * z) / (end_alpha - ratio * alpha)
    short = (alpha * z - sigma * v - wanted).square().mean((1, 2, 3))
    distilled = (alpha / sigma).square().clamp(min=1).flatten() * short
    return distilled, (told - (alpha * some.noise - sigma * some.latents)).square().mean((1, 2, 3))


@pytest.mark.parametrize(("probability", "w"), [(0.0, None), (1.0, 3.0)])
def test_the_losses_and_their_gradient_are_the_papers(probability: float, w: float | None) -> None:
    """L = L_dstl + γ·[L_dstl / L_ori]·L_ori, the ratio without a gradient: 1.2·L_dstl in value, not in gradient."""
    learner, teaches = objective(cfg_probability=probability, cfg_range=(w or 2, w or 14), original_loss_weight=0.2)
    some = some_batch()
    found = learner(some)
    distilled, original = losses_by_hand(learner, teaches, some, w)
    torch.testing.assert_close(found["distillation"], distilled.mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["original"], original.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], 1.2 * distilled.mean(), rtol=1e-3, atol=1e-5)
    wanted = (distilled + 0.2 * (distilled / original).detach() * original).mean()
    weights = list(learner.student.parameters())
    ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (found["loss"], wanted))
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()) + 1e-6)


class Knowing(nn.Module):
    """Says the v of data that it knows: each of its DDIM steps ends on the way to them."""

    def __init__(self, data: Tensor, off: float = 0) -> None:
        super().__init__()
        self.data, self.off = data, nn.Parameter(torch.tensor(float(off)))

    def forward(self, z: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        alpha, sigma = variance_preserving.alpha_sigma(t, z)
        return (alpha * z - self.data.repeat(len(z) // len(self.data), 1, 1, 1) - self.off) / sigma


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_perfect_student_has_no_loss(probability: float) -> None:
    some = some_batch()
    teaches = Knowing(some.latents + 0.5).requires_grad_(False)
    losses = {}
    for off in (0.5, 0.6):
        perfect = ProgressiveDistillationObjective(
            Knowing(some.latents, off),
            teacher=teaches,
            stage=stage(cfg_probability=probability),  # type: ignore[arg-type]
        )
        losses[off] = perfect(some)["loss"].item()
    assert losses[0.5] < 1e-8
    assert losses[0.6] > 1e-3


@pytest.mark.parametrize("prediction", ["v", "noise"])
def test_training_brings_the_student_to_its_teacher(prediction: variance_preserving.DiffusionPredictionType) -> None:
    learner, _ = objective(prediction, cfg_probability=0.5, cfg_range=(1.5, 3), original_loss_weight=0)
    some, optimizer = batch(t=[0.624, 0.374]), torch.optim.AdamW(learner.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = learner(dataclasses.replace(some, random=StepRandom(seed=1, step=step, rows=range(2))))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# --- what is drawn ---


def test_a_step_is_guided_as_often_as_it_is_said_and_whole() -> None:
    learner, _ = objective(cfg_probability=0.1)
    some, guided = batch(count=4), []
    for step in range(2000):
        halves = [
            learner.guidance_scale(dataclasses.replace(batch(count=2), random=StepRandom(seed=5, step=step, rows=rows)))
            for rows in (range(2), range(2, 4))
        ]
        whole = learner.guidance_scale(dataclasses.replace(some, random=StepRandom(seed=5, step=step, rows=range(4))))
        if whole is None:
            assert halves == [None, None]
        else:
            assert torch.equal(whole, torch.cat(halves))  # type: ignore[arg-type]
            guided.append(whole.flatten())
    assert 0.08 < len(guided) / 2000 < 0.12
    drawn = torch.cat(guided)
    assert 2 <= drawn.min() < 2.5
    assert 13.5 < drawn.max() <= 14
    assert drawn.mean().item() == pytest.approx(8, abs=0.4)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_nothing_waits_for_the_device(probability: float) -> None:
    learner, _ = objective(cfg_probability=probability)
    with NoReading():
        learner(some_batch())["loss"].backward()


def test_without_captions_nothing_is_guided() -> None:
    learner, _ = objective(cfg_probability=1)
    assert learner.guidance_scale(dataclasses.replace(some_batch(), context=None)) is None


def test_only_the_student_is_trained_and_saved() -> None:
    learner, _ = objective()
    assert {name.split(".")[0] for name in learner.state_dict()} == {"student"}
    assert len(list(learner.parameters())) == len(list(learner.student.parameters()))


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_steps": 15}, "teacher_steps 15 is odd"),
        ({"teacher_steps": 0}, "greater than or equal to 2"),
        ({"cfg_probability": 1.5}, "less than or equal to 1"),
        ({"cfg_probability": -0.1}, "greater than or equal to 0"),
        ({"cfg_range": (14, 2)}, "cfg_range \\[14, 2\\] is not"),
        ({"original_loss_weight": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stage(**changes)


def test_the_student_takes_half_the_steps() -> None:
    assert [stage(teacher_steps=steps).student_steps for steps in (32, 16, 2)] == [16, 8, 1]
